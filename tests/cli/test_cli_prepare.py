from __future__ import annotations

import json
import pty
import subprocess
import sys
from os import close, read

import pytest

from hypershard.cli import prepare
from hypershard.config.schema import DataConfig
from hypershard.data.bins.meta import read_meta
from hypershard.data.bins.prepare import SPLIT_SEED, VAL_SHARE
from hypershard.data.bins.token_bins import open_token_bins
from hypershard.data.open import EMBEDDED_VAL_SHARE
from hypershard.errors import ConfigError, DataError, StorageError

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words(*argv):
    return [str(word) for word in argv]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"content": f"{n} two three four five six seven"}) + "\n" for n in range(50)))
    return path


@pytest.fixture
def chats(tmp_path):
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Quite well."}]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return path


def test_makes_a_folder_and_says_how_to_use_it(text, tmp_path, capsys):
    output = tmp_path / "bins"
    assert prepare.run(words(text, "--output", output, "--text_field", "content", "--val_share", 0.2)) == 0
    train, val = open_token_bins(output)
    printed = capsys.readouterr().out
    assert f"{train.num_tokens:,} tokens" in printed and f"{val.num_documents:,} documents" in printed
    assert f"longest document {read_meta(output).longest_document_tokens}" in printed
    assert "malformed" not in printed and f"hypershard train --dataset {output}" in printed


def test_the_embedded_corpus_can_be_prepared(tmp_path):
    assert prepare.run(words("embedded", "--output", tmp_path / "bins")) == 0
    assert open_token_bins(tmp_path / "bins")[0].num_tokens > 500_000


def test_conversations_are_recognised(chats, tmp_path):
    output = tmp_path / "bins"
    assert prepare.run(words(chats, "--output", output, "--chat_template", tmp_path / "chat.jinja")) == 0
    train, _ = open_token_bins(output)
    targets = train.targets(0, train.num_tokens)
    assert 0 < targets.sum() < len(targets)


def test_malformed_rows_are_refused_or_counted(text, tmp_path, capsys):
    with open(text, "a") as file:
        file.write("{cut\n")
    flags = words(text, "--output", tmp_path / "bins", "--text_field", "content")
    with pytest.raises(DataError, match=r"a\.jsonl line 51: .*--malformed_rows=skip"):
        prepare.run(flags)
    assert prepare.run([*flags, "--malformed_rows", "skip"]) == 0
    assert "left out 1 malformed rows" in capsys.readouterr().out


def test_inspect_shows_what_the_loss_counts_and_writes_nothing(chats, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert prepare.run(words(chats, "--chat_template", tmp_path / "chat.jinja", "--inspect", 2)) == 0
    shown = capsys.readouterr().out
    assert shown.count("[[Quite well.") == 2 and sorted(tmp_path.iterdir()) == before
    assert prepare.run(words(chats, "--chat_template", tmp_path / "chat.jinja", "--inspect")) == 0
    assert capsys.readouterr().out.count("[[Quite well.") == 1


def test_preferences_are_asked_for_shown_and_counted_as_pairs(tmp_path, capsys):
    path, output = tmp_path / "pairs.jsonl", tmp_path / "bins"
    rows = [{"prompt": "Far?", "chosen": " No.", "rejected": f" Yes, {n}.", "text": "a"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = words(path, "--data_kind", "preference")
    assert prepare.run([*flags, "--inspect", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- chosen\nFar?[[ No.<|endoftext|>]]") == 2
    assert "--- rejected\nFar?[[ Yes, 1.<|endoftext|>]]" in shown and shown.count("; the loss counts ") == 4
    assert prepare.run([*flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    train, _ = open_token_bins(output)
    assert train.kind == "preference" and f"{train.num_documents} pairs" in printed
    assert f"hypershard train --dataset {output} --objective dpo" in printed


def test_verify_reads_every_byte(text, tmp_path, capsys):
    output = tmp_path / "bins"
    prepare.run(words(text, "--output", output, "--text_field", "content"))
    assert prepare.run(words("--verify", output)) == 0
    content = bytearray((output / "val.bin").read_bytes())
    content[3] ^= 16
    (output / "val.bin").write_bytes(content)
    capsys.readouterr()
    assert prepare.run(words("--verify", output)) == 1
    assert "val.bin: found sha256" in capsys.readouterr().err


def test_bad_input_and_output_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        prepare.run(words(tmp_path / "missing.txt", "--output", tmp_path / "bins"))
    with pytest.raises(StorageError, match="--output=s3://bucket"):
        prepare.run(words("embedded", "--output", "s3://bucket/bins"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "found no INPUT"),
        (("embedded",), "found no --output"),
        (("embedded", "--output", "bins", "--num_processes", "0"), "--num_processes=0: expected at least 1"),
        (("embedded", "--output", "bins", "--malformed_rows", "drop"), "--malformed_rows: found 'drop'"),
        (("embedded", "--output", "bins", "--inspect"), "no --output"),
        (("embedded", "--verify", "bins"), "--verify=bins takes no INPUT"),
    ],
)
def test_flags_that_cannot_act_are_refused(flags, named):
    with pytest.raises(ConfigError, match=named):
        prepare.run(flags)


def test_a_share_beside_files_named_val_is_refused(tmp_path):
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("a few words here")
    with pytest.raises(ConfigError, match=r"--val_share=0\.5: .* has files named val"):
        prepare.run(words(tmp_path, "--output", tmp_path / "bins", "--val_share", 0.5))


def test_a_terminal_sees_a_bar(text, tmp_path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "hypershard.cli.main", "prepare", *words(text, "--text_field", "content")]
    subprocess.run([*command, "--output", tmp_path / "bins"], stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    close(terminal)
    shown = read(controller, 10_000).decode()
    close(controller)
    assert "tokenising" in shown and "tokens, " in shown and "/s" in shown


def test_help_teaches_without_torch_or_tokenizers():
    code = (
        "import sys; from hypershard.cli import prepare; print(prepare.build_parser().format_help());"
        "assert not {'torch', 'tokenizers', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for part in ("--text_field", "--val_share", "--tokenizer", "--inspect", "examples:", "hypershard train --dataset"):
        assert part in done.stdout


def test_the_defaults_shown_are_the_defaults_used():
    # --help must start fast, so the parser does not import the modules these live in.
    parser = prepare.build_parser()
    args = parser.parse_args(["a.txt", "--output", "bins"])
    shown = " ".join(parser.format_help().split())
    assert args.split_seed == SPLIT_SEED and f"(default: {DataConfig().text_field})" in shown
    assert f"(default: {VAL_SHARE}; embedded: {EMBEDDED_VAL_SHARE})" in shown
