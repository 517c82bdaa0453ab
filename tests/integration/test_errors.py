"""Bad input: one clear error on one rank's log, exit code not 0, no hang, nothing lost."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.integration.processes import history, steps, train, train_well

from hypershard.metrics.sinks import read_json_lines

pytestmark = pytest.mark.slow


def assert_one_clear_error(code: int, output: str, *parts: str) -> None:
    assert code not in (0, None), output
    for part in parts:
        assert part in output, output
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if " E " in line[:20] or line.startswith("hypershard train:")]
    assert len(errors) == 1, output


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token bins made by `hypershard prepare`."""
    from hypershard.cli.prepare import run

    folder = tmp_path_factory.mktemp("data")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 40}) + "\n" for n in range(200)))
    assert run([str(folder / "text.jsonl"), "--output", str(folder / "bins")]) == 0
    return folder / "bins"


def test_a_wrong_flag() -> None:
    assert_one_clear_error(*train(nproc_per_node=2, hidden_widht=3), "did you mean --hidden_width")


def test_a_wrong_combination_found_by_every_rank(tmp_path: Path) -> None:
    flags = {"run_dir": tmp_path / "run", "sharding_strategy": "hybrid", "hybrid_shard_degree": 3}
    assert_one_clear_error(*train(nproc_per_node=2, **flags), "--hybrid_shard_degree=3 does not divide the 2 ranks")


def test_a_run_that_does_not_fit_is_refused_and_what_it_is_told_helps(tmp_path: Path) -> None:
    flags = {"run_dir": tmp_path / "run", "nproc_per_node": 2, "max_steps": 2, "checkpoint_freq": 0}
    code, output = train(**flags, train_batch_size=10**9)
    assert_one_clear_error(code, output, "does not fit", "of a rank's share of the host's memory", "--force")
    told = re.search(r"it fits with (--.*?)(,|\.)", output)
    assert told is not None, output
    changes = dict(word.removeprefix("--").split("=") for word in told.group(1).split())
    train_well(**flags | {"train_batch_size": 10**9} | changes)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [("truncated", ("train.bin", "bytes")), ("missing", ("train.bin",)), ("nothing there", ("found nothing there",))],
)
def test_damaged_data(bins: Path, tmp_path: Path, damage: str, parts: tuple[str, ...]) -> None:
    folder = tmp_path / "bins"
    if damage != "nothing there":
        subprocess.run(["cp", "-r", str(bins), str(folder)], check=True)
        file = folder / "train.bin"
        file.write_bytes(file.read_bytes()[:1000])
        if damage == "missing":
            file.unlink()
    code, output = train(run_dir=tmp_path / "run", nproc_per_node=2, dataset=folder)
    assert_one_clear_error(code, output, *parts)


def test_empty_and_short_data(bins: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    code, output = train(run_dir=tmp_path / "a", dataset=tmp_path / "empty.txt", cache_dir=tmp_path / "cache")
    assert_one_clear_error(code, output, "empty.txt")
    flags = {"max_context_width": 65536, "max_position_embeddings": 65536}
    code, output = train(run_dir=tmp_path / "b", dataset=bins, **flags)
    assert_one_clear_error(code, output, "--max_context_width")


def test_a_checkpoint_of_another_model_and_a_second_start(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_well(run_dir=run_dir, max_steps=2, nproc_per_node=2)
    before = history(run_dir)
    other = {"run_dir": run_dir, "nproc_per_node": 2, "resume_from_checkpoint": "auto"}
    assert_one_clear_error(*train(**other, num_layers=3), "checkpoint")
    # The same shapes, another rotary base: no tensor differs, the model does.
    code, output = train(**other, rotary_emb_base=250000, max_steps=4)
    assert_one_clear_error(code, output, "rotary_emb_base 500000", "250000")
    assert_one_clear_error(*train(run_dir=run_dir, max_steps=4), "already holds a run", "--resume_from_checkpoint")
    assert history(run_dir) == before
    train_well(**other, max_steps=4)
    assert [line[0] for line in history(run_dir)] == [1, 2, 3, 4]


@pytest.fixture
def small_disk(small_disk: Path) -> Path:
    """With room for one checkpoint of the small run, not for three."""
    subprocess.run(["mount", "-o", "remount,size=17m", str(small_disk)], check=True)
    return small_disk


def test_a_full_disk_at_save(small_disk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = {"run_dir": run_dir, "checkpoint_dir": small_disk, "nproc_per_node": 2}
    code, output = train(**flags, in_memory_checkpointing_freq=0)
    assert_one_clear_error(code, output, str(small_disk), "space")
    saved = sorted(path.parent.name for path in small_disk.glob("step-*/MANIFEST.json"))
    assert saved, "the checkpoint that fitted is still there"
    assert not list(small_disk.glob("*/*.tmp*"))
    output = train_well(**{**flags, "checkpoint_dir": tmp_path / "elsewhere"}, resume_from_checkpoint=small_disk)
    assert f"going on after step {int(saved[-1].removeprefix('step-'))} " in output
    assert len(steps(run_dir)) == 14


def test_a_full_disk_is_an_alarm_while_memory_takes_the_saves(small_disk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, output = train(run_dir=run_dir, checkpoint_dir=small_disk, nproc_per_node=2)
    assert len(steps(run_dir)) == 14, "training goes on to its end"
    assert code == 2, "but the last step is on no disk"
    assert output.count(" E ALARM: a save to disk failed") == 1 and "Traceback" not in output
    kinds = [record["event"] for record in read_json_lines(run_dir / "events.jsonl")]
    assert "alarm" in kinds and kinds[-1] == "failed"


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_well(run_dir=run_dir, max_steps=8, nproc_per_node=2)
    whole = history(run_dir)
    file = next((run_dir / "checkpoints" / "step-00000008").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output = train_well(run_dir=run_dir, max_steps=8, nproc_per_node=2, resume_from_checkpoint="auto")
    assert "damaged" in output and "step-00000008" in output
    assert "going on after step 4 " in output
    assert history(run_dir) == whole
