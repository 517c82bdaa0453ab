"""Killed anywhere, a run ends with exactly the losses of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.processes import (
    command,
    environment,
    finish,
    history,
    is_gone,
    ranks_of,
    start,
    steps,
    train_well,
    wait_for_step,
)

from hypershard.metrics.sinks import read_json_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run on two ranks from start to end."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    output = train_well(run_dir=run_dir, nproc_per_node=2)
    assert len(steps(run_dir)) == 14, output
    return run_dir


@pytest.mark.parametrize(
    ("victim", "step"),
    [("rank 0", 2), ("rank 1", 6), ("parent", 11)],
    ids=["before the first save", "rank 1", "parent"],
)
def test_sigkill_at_any_step(uninterrupted: Path, tmp_path: Path, victim: str, step: int) -> None:
    run_dir = tmp_path / "run"
    process = start(command(run_dir=run_dir, nproc_per_node=2))
    wait_for_step(run_dir, step, process)
    ranks = ranks_of(process)
    os.kill({"rank 0": ranks[0], "rank 1": ranks[1], "parent": process.pid}[victim], signal.SIGKILL)
    code, output = finish(process)
    assert code == (-signal.SIGKILL if victim == "parent" else 128 + signal.SIGKILL), output
    assert all(is_gone(rank) for rank in ranks), "a rank outlived its job"
    train_well(run_dir=run_dir, nproc_per_node=2, resume_from_checkpoint="auto")
    assert history(run_dir) == history(uninterrupted)


def test_sigterm_saves_and_the_rest_follows(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(command(run_dir=run_dir, nproc_per_node=2))
    wait_for_step(run_dir, 5, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    done = len(steps(run_dir))
    assert 5 <= done < 14
    assert "(SIGTERM)" in output
    assert (run_dir / "checkpoints" / f"step-{done:08d}" / "MANIFEST.json").exists()
    output = train_well(run_dir=run_dir, nproc_per_node=2, resume_from_checkpoint="auto")
    assert f"going on after step {done} " in output
    assert history(run_dir) == history(uninterrupted)


def test_a_finished_run_resumed_does_nothing_more(uninterrupted: Path) -> None:
    before = history(uninterrupted)
    train_well(run_dir=uninterrupted, nproc_per_node=2, resume_from_checkpoint="auto")
    assert history(uninterrupted) == before


def test_another_world_size_and_strategy_go_on_with_the_same_samples(uninterrupted: Path, tmp_path: Path) -> None:
    """Two ranks sharded fully -> one rank with twice the micro-steps, by torchrun's file, from the other's folder."""
    run_dir = tmp_path / "run"
    flags = {"run_dir": run_dir, "resume_from_checkpoint": uninterrupted / "checkpoints" / "step-00000008"}
    settings = {"sharding_strategy": "zero1", "gradient_accumulation_steps": 2}
    words = command(**flags, **settings)
    at = words.index("train")
    script = Path(__file__).parents[2] / "src" / "train.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script)]
    done = subprocess.run(
        [*torchrun, *words[at + 1 :]], env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    resumed, whole = history(run_dir), history(uninterrupted)[8:]
    assert [line[0] for line in resumed] == [line[0] for line in whole]
    for found, expected in zip(resumed, whole, strict=True):
        # Sums in another order: see tests/train/test_numerics.py for the tolerance.
        assert found[1] == pytest.approx(expected[1], rel=2e-5)
        assert found[3:] == expected[3:]


def test_three_ranks_resume_bit_for_bit_and_go_on_alike_on_one(tmp_path: Path) -> None:
    """Rows that do not divide by three: FSDP2 pads such shards, and the checkpoint must hold what it trains."""
    flags = {"max_steps": 8, "checkpoint_freq": 4}
    train_well(run_dir=tmp_path / "whole", nproc_per_node=3, **flags)
    whole = history(tmp_path / "whole")
    flags |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoints" / "step-00000004"}
    train_well(run_dir=tmp_path / "three", nproc_per_node=3, **flags)
    assert history(tmp_path / "three") == whole[4:]
    train_well(run_dir=tmp_path / "one", gradient_accumulation_steps=3, **flags)
    assert [line[1] for line in history(tmp_path / "one")] == pytest.approx([line[1] for line in whole[4:]], rel=2e-5)


def test_hours_end_a_run_with_a_save(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    output = train_well(run_dir=run_dir, nproc_per_node=2, max_hours=1e-9)
    assert "(hours)" in output
    done = len(steps(run_dir))
    assert done < 4, "the time was over before the first step ended"
    assert (run_dir / "checkpoints" / f"step-{done:08d}" / "MANIFEST.json").exists()


def test_epochs_end_a_run_once(tmp_path: Path) -> None:
    """Two passes over a small text, and not a step more in each pass."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a short text about nothing" for number in range(300)))
    run_dir = tmp_path / "run"
    flags = {"dataset": text, "cache_dir": tmp_path / "cache", "max_steps": None, "epochs": 2, "logging_freq": 1}
    train_well(run_dir=run_dir, nproc_per_node=2, **flags)
    per_epoch = steps(run_dir)[-1]["tokens"] / 2
    output = train_well(run_dir=tmp_path / "one", nproc_per_node=2, **{**flags, "epochs": 1})
    assert abs(steps(tmp_path / "one")[-1]["tokens"] - per_epoch) <= 64 * 4, output


def test_minutes_and_sigusr2_save_without_a_stop(uninterrupted: Path, tmp_path: Path) -> None:
    """A save every hundredth of a minute on a run that saves by no steps; and one more for the signal."""
    process = start(command(run_dir=tmp_path, nproc_per_node=2, checkpoint_freq="none", checkpoint_minutes=0.01))
    wait_for_step(tmp_path, 3, process)
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGUSR2)
    code, output = finish(process)
    assert code == 0, output
    records = read_json_lines(tmp_path / "events.jsonl")
    saved = [record["step"] for record in records if "disk" in record.get("tiers", ())]
    assert saved, "something was saved before the end"
    assert history(tmp_path) == history(uninterrupted)
