"""A short campaign of tests/faults/chaos.py, and that what it checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults import checks, kinds
from tests.faults.chaos import run_campaign
from tests.faults.checks import Reference
from tests.faults.job import Job, Violation
from tests.faults.kinds import Loss
from tests.faults.plans import Planner
from tests.faults.survivors import DISK, LOCAL, MEMORY, S3, Candidate, RunPlaces, Survivors
from tests.nodes import nodes_available

from hypershard.checkpoint.lineage import Lineage
from hypershard.s3 import S3Uri

SEED, NUM_FAULTS = 11, 10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    if reason := nodes_available():
        pytest.skip(reason)
    return tmp_path / "site"


@pytest.mark.slow
def test_any_fault_bit_for_bit(root: Path) -> None:
    statistics, violation = run_campaign(root, seed=SEED, num_faults=NUM_FAULTS)
    assert violation is None, violation
    made = set(statistics.faults)
    assert statistics.num_faults >= NUM_FAULTS
    assert made & set(kinds.ENDINGS) and made & set(kinds.DAMAGES)
    assert any(kind.startswith("S3") for kind in made)
    assert sum(statistics.restored.values()) >= 2, "hardly anything was restored"


@pytest.mark.slow
def test_other_numbers_of_ranks(root: Path) -> None:
    _, violation = run_campaign(root, seed=SEED, num_faults=0, num_reshapes=2)
    assert violation is None, violation


def test_equal_seeds_give_equal_plans_and_every_kind_comes() -> None:
    first, second, other = Planner(3), Planner(3), Planner(4)
    plans = [first.next(is_quiet=False) for _ in range(60)]
    assert plans == [second.next(is_quiet=False) for _ in range(60)]
    assert plans != [other.next(is_quiet=False) for _ in range(60)]
    planned = {kind for plan in plans for _, kind in (*plan.disturbances, *([plan.ending] if plan.ending else []))}
    planned |= {kind for plan in plans for kind in plan.damages}
    assert planned == set(kinds.ALL_KINDS)


# --- the checks ----------------------------------------------------------------------------------------------

HISTORY = {step: (step, 9.0 - step, 1.0, 0.1, 64 * step) for step in range(1, 11)}
REFERENCE = Reference(HISTORY, 7.0, "digest")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def records(num_steps: int) -> list[dict[str, Any]]:
    return [
        dict(zip(("step", "loss", "grad_norm", "lr", "tokens"), HISTORY[n + 1], strict=True)) for n in range(num_steps)
    ]


def places(tmp_path: Path, lines: list[dict[str, Any]]) -> RunPlaces:
    write_lines(tmp_path / "run" / "metrics.jsonl", lines)
    return RunPlaces(tmp_path / "run", tmp_path / "run" / "checkpoints", S3Uri("chaos", "run"))


def job(tmp_path: Path, *, num_steps: int, events: list[dict[str, Any]], log: str = "", code: int = 1) -> Job:
    """One start of two ranks that has ended, as it left its files."""
    where = places(tmp_path, records(num_steps))
    write_lines(where.run_dir / "events.jsonl", [{"at": 1.0, **one} for one in events])
    flags = {"run_dir": where.run_dir, "in_memory_checkpointing_freq": 2}
    found = Job(TwoNodes(), tmp_path / "start", shape=(2, 1), flags=flags, port=1)  # type: ignore[arg-type]
    found.folder.mkdir()
    for rank in range(2):
        (found.folder / f"rank-{rank}.log").write_text(log)
        (found.folder / f"rank-{rank}.exit").write_text(str(code))
    return found


class TwoNodes:
    nodes = (None, None)


def candidate(tier: str, step: int, *damaged: str, generation: int = 1) -> Candidate:
    return Candidate(tier, Lineage(generation, "a"), step, 1, damaged)


def survivors(*candidates: Candidate, broken: tuple[str, ...] = ()) -> Survivors:
    return Survivors(tuple(sorted(candidates, key=lambda one: one.order, reverse=True)), broken)


def saved(step: int, *tiers: str) -> dict[str, Any]:
    return {"event": "saved", "step": step, "tiers": tiers}


STARTED = {"event": "started", "step": 0}


def test_a_loss_that_differs_in_its_last_bit_and_a_step_done_twice_are_noticed(tmp_path: Path) -> None:
    lines = records(5)
    checks.check_history(places(tmp_path, lines), REFERENCE)
    with pytest.raises(Violation, match="each once"):
        checks.check_history(places(tmp_path, [*lines, lines[-1]]), REFERENCE)
    lines[2]["loss"] += 1e-15
    with pytest.raises(Violation, match="step 3"):
        checks.check_history(places(tmp_path, lines), REFERENCE)


def test_saying_all_is_well_before_the_end_is_noticed(tmp_path: Path) -> None:
    early = job(tmp_path, num_steps=5, events=[STARTED, {"event": "stopped", "step": 5}], code=0)
    checks.check_codes(early, Loss(was_asked=True), REFERENCE)
    with pytest.raises(Violation, match="exit codes"):
        checks.check_codes(early, Loss(), REFERENCE)


def test_a_traceback_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(Violation, match="OSError"):
        checks.check_no_traceback(
            job(tmp_path, num_steps=1, events=[], log="Traceback (most recent call last):\nOSError")
        )


def test_going_on_from_anything_but_the_newest_is_noticed(tmp_path: Path) -> None:
    log = "12:00:00 I restored step 4 from memory step 4 (start 1)"
    start = job(tmp_path, num_steps=6, events=[{"event": "started", "step": 4}], log=log)
    checks.check_restored(start, survivors(candidate(MEMORY, 4), candidate(DISK, 2)), s3_was_broken=False)
    newer = survivors(candidate(MEMORY, 4), candidate(S3, 6))
    with pytest.raises(Violation, match=r"expected \[6\]"):
        checks.check_restored(start, newer, s3_was_broken=False)
    checks.check_restored(start, newer, s3_was_broken=True)


def test_damage_that_is_not_named_is_noticed(tmp_path: Path) -> None:
    start = job(
        tmp_path,
        num_steps=6,
        events=[{"event": "started", "step": 4}],
        log="restored step 4 from memory step 4 (start 1)",
    )
    lay = survivors(candidate(MEMORY, 4), candidate(DISK, 6, "step-00000006/.metadata"))
    with pytest.raises(Violation, match=r"step-00000006/\.metadata"):
        checks.check_restored(start, lay, s3_was_broken=False)
    with pytest.raises(Violation, match="own/rank-00000/slot-1"):
        checks.check_restored(
            start, survivors(candidate(MEMORY, 4), broken=("own/rank-00000/slot-1",)), s3_was_broken=False
        )


def test_a_save_that_is_neither_there_nor_alarmed_is_noticed(tmp_path: Path) -> None:
    events = [STARTED, saved(4, S3), saved(8, S3)]
    silent = job(tmp_path / "silent", num_steps=9, events=events)
    with pytest.raises(Violation, match="step 4 was saved to s3"):
        checks.check_saves_are_there_or_alarmed(silent, survivors(candidate(DISK, 4)))
    checks.check_saves_are_there_or_alarmed(silent, survivors(candidate(S3, 4)))
    loud = job(tmp_path / "loud", num_steps=9, events=[*events, {"event": "alarm", "text": "a save to s3 failed"}])
    checks.check_saves_are_there_or_alarmed(loud, survivors())


def test_what_must_survive(tmp_path: Path) -> None:
    events = [
        STARTED,
        saved(2, MEMORY),
        saved(3, LOCAL),
        saved(4, MEMORY, DISK),
        saved(6, MEMORY, LOCAL),
        saved(8, DISK),
    ]
    start = job(tmp_path, num_steps=9, events=events)

    def bound(loss: Loss) -> int:
        return checks.must_have_survived(start, loss, REFERENCE)

    assert bound(Loss()) == 8
    assert bound(Loss(memory=frozenset({0}))) == 6
    everywhere = frozenset({0, 1})
    assert bound(Loss(memory=everywhere)) == 4
    assert bound(Loss(memory=everywhere, disks=everywhere)) == 4
    with pytest.raises(Violation, match="step 8 must have survived"):
        checks.check_survivors(start, Loss(), survivors(candidate(MEMORY, 6)), REFERENCE)
    start.run_dir.joinpath("metrics.jsonl").unlink()
    write_lines(start.run_dir / "metrics.jsonl", records(8))
    assert bound(Loss()) == 6, "the last one may not be whole on every rank yet"
