import json
from pathlib import Path

import pytest

from hypershard.errors import DataError
from hypershard.report.read import read_run
from hypershard.report.terminal import draw_curve, render


def write_run(path: Path, num_steps: int) -> None:
    records = [
        {"step": step, "loss": 8.0 - step / 10, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 512, "step_seconds": 0.5,
         "tokens_per_second": 1024.0, "mfu": None, "memory_bytes": 2**30, "skipped": False,
         "data_seconds": 0.02, "padding": 0.125}
        for step in range(1, num_steps + 1)
    ]  # fmt: skip
    records.append({"step": num_steps, "validation_loss": 7.0, "tokens": 1})
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (path / "checkpoints" / "step-00000010" / "MANIFEST.json").write_text("{}")
    (path / "checkpoints" / "step-00000020").mkdir()  # torn: no manifest


def test_summary_and_text(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 20)
    summary = read_run(tmp_path / "run")
    assert summary.losses[0] == 7.9
    assert summary.seconds == pytest.approx(10.0)
    assert summary.tokens == 20 * 512
    assert summary.checkpoint_steps == (10,)
    text = render(summary)
    for part in (
        "7.9000 at step 1, 6.0000 at step 20",
        "+1.9000 nats",
        "1.024k tokens/s",
        "4.0% of the steps' time waited for it, 12.5% padding",
        "validation 7.0000",
        "steps 10",
    ):
        assert part in text


def test_texts_first_and_newest_escaped(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 5)
    written = [
        {"step": 2, "prompt": "Given up", "text": "gone"},
        {"step": 2, "prompt": "Once " * 40, "text": "a[bold]b\x1b[31m\x9b\u202e"},
        {"step": 4, "prompt": "Once " * 40, "text": "upon a time\n" + "word " * 200},
        {"step": 4, "prompt": "New", "text": "x"},
    ]
    (tmp_path / "run" / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    found = {one.prompt: one for one in read_run(tmp_path / "run").texts}
    assert list(found) == ["Once " * 40, "New"] and found["New"].first == found["New"].newest == (4, "x")
    text = render(read_run(tmp_path / "run"))
    assert "after      '…" in text and r"step 2     'a[bold]b\x1b[31m\x9b\u202e'" in text
    assert r"step 4     'upon a time\nword word" in text and text.count("step 4     'x'") == 1
    assert all(one.isprintable() or one == "\n" for one in text) and max(map(len, text.splitlines())) <= 100
    assert "more, in texts.jsonl" not in text


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_run(tmp_path / "run").steps[-1] == 5


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        read_run(tmp_path)


def test_curve_marks_first_and_last() -> None:
    lines = draw_curve([1, 2, 3, 4], [4.0, 3.0, 2.0, float("nan")], width=10, height=3).splitlines()
    assert lines[0].startswith("   4.000 ┤•")
    assert lines[2].rstrip().endswith("•")
    assert "step 3" in lines[-1]
    assert draw_curve([1], [float("nan")]) == "(no finite loss to draw)"
