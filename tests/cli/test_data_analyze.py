from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from hypershard.cli import data
from hypershard.errors import ConfigError, DataError, StorageError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture
def texts(tmp_path):
    """60 documents, one of them twice, and a line that is none."""
    rows = [json.dumps({"text": " ".join(WORDS[: 4 + number % 8]) + f" {number}"}) for number in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*rows, rows[3], "{no", ""]))
    return path


def analyze(*argv):
    return data.run(["analyze", *map(str, argv)])


def test_prints_what_is_there(texts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert analyze(texts) == 0
    printed = capsys.readouterr().out
    assert f"{texts}: 61 documents, all of them read" in printed
    assert re.search(r"duplicates +1 \(1\.6%\)\n +.*line 61 is the same as .*line 4\n", printed)
    assert re.search(r"malformed +1 \(1\.6%\)\n +.*line 62: not JSON", printed)
    bars = [line for line in printed.splitlines() if "│" in line]
    assert len({line.index("│") for line in bars}) == 1 and max(map(len, bars)) <= 100
    assert sum(int(line.split()[-2]) for line in bars[1:]) == 61
    assert "--malformed_rows=skip" in printed and "arXiv:2107.06499" in printed.replace("\n    ", " ")
    assert "sequences of" not in printed, "no context is given"


def test_says_what_a_plan_makes_of_it(texts, capsys):
    flags = ("--max_context_width", 16, "--train_batch_size", 2, "--num_gpus", 2, "--max_steps", 400)
    assert analyze(texts, *flags) == 0
    printed = capsys.readouterr().out
    for way in ("concat", "best_fit, split", "best_fit, truncate", "best_fit, drop", "none, split"):
        assert f"    {way} " in printed
    assert "◂ context" in printed
    assert "plan: 4 sequences a step (concat)" in printed and "25.6k tokens seen" in printed
    assert "2305.16264" in printed


def test_json_is_one_object(texts, capsys):
    flags = ("--max_context_width", 16, "--global_batch_tokens", 128, "--packing", "best_fit", "--epochs", 6)
    assert analyze(texts, "--json", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == {"context_tokens": 16, "samples_per_step": 8, "num_steps": None, "epochs": 6}
    (one,) = found["datasets"]
    assert one["num_samples"] == 61 and one["use"]["fit"]["packing"] == "best_fit"
    assert one["use"]["epochs"] == pytest.approx(6, abs=0.5)
    assert {warning["code"] for warning in found["warnings"]} == {"malformed", "duplicates", "repetition"}


def test_pairs_of_answers_are_counted_whole(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{number}:", "chosen": " one", "rejected": " two" * number} for number in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert analyze(path, "--max_context_width", 24, "--max_steps", 4) == 0
    printed = capsys.readouterr().out
    assert f"{path}: 30 pairs, all of them read" in printed and "of which the loss counts" in printed
    assert "    best_fit, drop " in printed and "    none, drop " in printed
    assert "truncate" not in printed and "concat" not in printed
    assert "of pairs left out" in printed and "not packed, one pair a sequence" in printed
    with pytest.raises(ConfigError, match=r"--packing=concat: pairs of answers stay whole"):
        analyze(path, "--max_context_width", 24, "--packing", "concat")


def test_a_sample_says_so(texts, capsys):
    assert analyze(texts, "--sample", 20) == 0
    assert re.search(r"20 documents, the first ones, of about \d\d\n", capsys.readouterr().out)


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_draws_the_lengths(texts, tmp_path, suffix, begins):
    picture = tmp_path / f"lengths.{suffix}"
    assert analyze(texts, "--picture", picture, "--max_context_width", 16) == 0
    assert picture.read_bytes().startswith(begins)
    if suffix == "svg":
        assert b"<!-- length (tokens) -->" in picture.read_bytes() and b"<!-- context 16 -->" in picture.read_bytes()


def test_without_matplotlib_the_extra_is_named(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'hypershard[plots]'")):
        analyze(texts, "--picture", tmp_path / "lengths.png")


def test_wrong_flags_are_refused_before_anything_is_read(texts, tmp_path):
    nothing = tmp_path / "nothing.jsonl"
    with pytest.raises(ConfigError, match=r"--picture=.*found \.jpg; expected \.png or \.svg"):
        analyze(nothing, "--picture", tmp_path / "lengths.jpg")
    with pytest.raises(StorageError, match=r"--picture=s3://bucket/a\.png"):
        analyze(nothing, "--picture", "s3://bucket/a.png")
    with pytest.raises(ConfigError, match="--max_steps: found no --max_context_width"):
        analyze(nothing, "--max_steps", 10)
    with pytest.raises(ConfigError, match="--num_gpus=0"):
        analyze(nothing, "--num_gpus", 0, "--max_context_width", 16)
    with pytest.raises(ConfigError, match="--sample=0"):
        analyze(nothing, "--sample", 0)
    with pytest.raises(ConfigError, match="--global_batch_tokens=100 is no multiple"):
        analyze(nothing, "--global_batch_tokens", 100, "--max_context_width", 16)
    with pytest.raises(DataError, match="found nothing there"):
        analyze(nothing)
    with pytest.raises(ConfigError, match="--packing=concat cuts wherever"):
        analyze(texts, "--max_context_width", 16, "--long_documents", "drop")


def test_rows_cannot_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three four"}\n{"te\\u001b[31mxt": 1}\n')
    assert analyze(tmp_path / "a.jsonl") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_help_teaches_without_torch_numpy_or_matplotlib():
    code = (
        "import sys; from hypershard.cli import data\n"
        "try: data.run(['analyze', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'tokenizers', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for part in ("--text_field", "--max_context_width", "--sample", "--picture", "examples:"):
        assert part in done.stdout
