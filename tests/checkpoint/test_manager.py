from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hyperpod_daemon import hyperpod_daemon
from tiny import blank, disk, manager_of, same, save, values

from hypershard.checkpoint.cadence import Cadence, Measured
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manager import MEMORY, CheckpointManager
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.snapshot import Snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.checkpoint.tier import CheckpointRecord
from hypershard.errors import CheckpointError, StorageError


class HeldTier(DurableTier):
    """The real tier, whose saves wait for `go` and fail while `broken`."""

    def __init__(self, directory: Path):
        super().__init__(Place(DiskStore(directory)))
        self.go = threading.Event()
        self.broken = False

    def save(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], lineage: Lineage) -> CheckpointRecord:
        assert self.go.wait(30)
        if self.broken:
            raise StorageError("the disk is gone")
        return super().save(step, snapshot, facts, lineage)


def steps_in(tier: DurableTier) -> list[int]:
    return [record.step for record in tier.list()]


def folders_in(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir())


def test_background_save_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    manager = manager_of(tier, asynchronous=True)
    tensors, facts = values(1), {"tokens": 7}
    manager.begin(0, tensors, facts)
    manager.save(1, tensors, facts, due=["disk"])
    for tensor in tensors.values():
        tensor.fill_(5)
    facts["tokens"] = 8
    manager.poll()
    assert steps_in(tier) == []
    tier.go.set()
    manager.save_last(1, tensors, facts)
    found = blank()
    assert manager.restore(found) == {"step": 1, "tokens": 7}
    assert same(found, values(1))


def test_slots_are_claimed_once(tmp_path: Path) -> None:
    manager = manager_of(disk(tmp_path / "disk"), asynchronous=True, memory_dir=tmp_path / "memory")
    save(manager, 1)
    slots = manager._nodes._pool.slots
    assert len(slots) == 3, "the newest whole one, the one being written, and one that the disk tier may be reading"
    for step in (2, 3, 4, 5):
        save(manager, step)
    manager.save_last(5, values(5), {})
    assert manager._nodes._pool.slots is slots
    assert len(list((tmp_path / "memory").rglob("slot-*"))) == 3
    found = blank()
    manager.restore(found)
    assert same(found, values(5))


def test_saving_in_place_copies_nothing(tmp_path: Path) -> None:
    manager = manager_of(disk(tmp_path))
    save(manager, 1)
    assert steps_in(manager.levels[0].tier) == [1] and manager._nodes._pool is None


def test_the_only_tier_that_fails_is_raised_once_and_the_next_save_works(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    tier.go.set()
    tier.broken = True
    manager = manager_of(tier, asynchronous=True)
    save(manager, 1)
    manager.levels[0].lane._thread.join()
    with pytest.raises(StorageError, match="the disk is gone"):
        manager.poll()
    tier.broken = False
    save(manager, 2)
    manager.save_last(2, values(2), {})
    assert steps_in(tier) == [2]


def test_with_another_tier_a_failed_save_is_an_alarm_and_training_goes_on(tmp_path: Path) -> None:
    tier, alarms = HeldTier(tmp_path / "disk"), []
    tier.go.set()
    tier.broken = True
    manager = manager_of(tier, asynchronous=True, memory_dir=tmp_path, home=tmp_path / "home", alarms=alarms)
    save(manager, 1)
    save(manager, 2)
    manager.poll()
    found = blank()
    assert manager.restore(found)["step"] == 2 and same(found, values(2))
    assert len(alarms) >= 1 and all("the disk is gone" in text for text in alarms)
    with pytest.raises(StorageError, match="the disk is gone"):  # memory ends with the job, so the end is not safe
        manager.save_last(2, values(2), {"step": 2})


def test_stats(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    manager = manager_of(tier, asynchronous=True)
    save(manager, 4)
    assert "disk" not in manager.last_saves
    tier.go.set()
    assert manager.save_last(4, values(4), {}) is False, "the tier has it"
    last = manager.last_saves["disk"]
    assert last.step == 4
    assert last.size_bytes == sum(tensor.nbytes for tensor in values(1).values())
    assert last.stall_seconds > 0 and last.write_seconds > 0
    assert manager.reserve_seconds >= 2 * last.write_seconds


@pytest.mark.parametrize("asynchronous", [False, True])
def test_keeps_the_newest(tmp_path: Path, asynchronous: bool) -> None:
    manager = manager_of(disk(tmp_path), keep=2, asynchronous=asynchronous)
    for step in (1, 2, 3, 4):
        save(manager, step)
    manager.save_last(4, values(4), {})
    assert folders_in(tmp_path) == ["step-00000003", "step-00000004"]


def test_keeps_every_nth_for_good(tmp_path: Path) -> None:
    manager = manager_of(disk(tmp_path), keep=1)
    manager.levels[0].keep_every = 3
    for step in range(1, 9):
        save(manager, step)
    assert steps_in(manager.levels[0].tier) == [8, 6, 3]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_keeps_the_best_and_saves_it_when_it_comes(tmp_path: Path, asynchronous: bool) -> None:
    """Steps 2 and 5 were the best when they were validated; besides, the test saves at every step."""
    manager = manager_of(disk(tmp_path), keep=1, asynchronous=asynchronous)
    manager.levels[0].keep_best = True
    (name,) = [level.name for level in manager.levels]
    found = []
    for step, best_step in enumerate([None, 2, 2, 2, 5, 5, 5], 1):
        busy = [False, True]  # the last save is still being written somewhere
        due = manager.due(step, busy, asked=False, best_step=best_step, step_seconds=1.0)
        assert due == ([name] if step == best_step else [])
        save(manager, step)
        manager.finish()
        found.append(steps_in(manager.levels[0].tier))
    assert found == [[1], [2], [3, 2], [4, 2], [5], [6, 5], [7, 5]]


def test_damaged_checkpoint_never_counts_as_kept(tmp_path: Path) -> None:
    first = manager_of(disk(tmp_path), keep=3)
    for step in (10, 20):
        save(first, step)
    (tmp_path / "step-00000020" / "facts.json").write_text("{}")
    manager = manager_of(disk(tmp_path), keep=1)
    assert manager.restore(blank())["step"] == 10
    manager.begin(10, values(10), {})
    save(manager, 20, values(3))
    assert steps_in(manager.levels[0].tier) == [20]
    found = blank()
    assert manager.restore(found) is not None and same(found, values(3))


def test_second_save_of_a_step_leaves_one_checkpoint(tmp_path: Path) -> None:
    manager = manager_of(disk(tmp_path), keep=3)
    for number in (1, 2):
        save(manager, 7, values(number))
    assert folders_in(tmp_path) == ["step-00000007.2"]
    found = blank()
    manager.restore(found)
    assert same(found, values(2))


def test_newer_checkpoints_of_another_run_are_refused_before_training(tmp_path: Path) -> None:
    save(manager_of(disk(tmp_path)), 50)
    manager = manager_of(disk(tmp_path), keep=1)
    with pytest.raises(CheckpointError, match=r"step-00000050 is newer than where this training starts \(step 0\)"):
        manager.begin(0, values(1), {})
    assert steps_in(manager.levels[0].tier) == [50]
    assert manager.restore(blank()) is not None
    manager.begin(50, values(1), {})


def test_restore_from_a_run_directory_or_one_step(tmp_path: Path) -> None:
    source = manager_of(disk(tmp_path / "run" / "checkpoints"))
    for step in (1, 2):
        save(source, step)
    manager = manager_of(disk(tmp_path / "other"))
    assert manager.restore(blank()) is None
    assert manager.restore(blank(), source=f"{tmp_path}/run")["step"] == 2
    assert manager.restore(blank(), source=f"{tmp_path}/run/checkpoints/")["step"] == 2
    found = blank()
    assert manager.restore(found, source=f"{tmp_path}/run/checkpoints/step-00000001")["step"] == 1
    assert same(found, values(1))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        manager.restore(blank(), source=f"{tmp_path}/run/checkpoints/step-00000001")


def test_restores_in_place_into_parameters(tmp_path: Path) -> None:
    manager = manager_of(disk(tmp_path))
    weight = torch.nn.Parameter(torch.randn(4, 4))
    save(manager, 1, {"model/w": weight})
    other = torch.nn.Parameter(torch.zeros(4, 4))
    address = other.data_ptr()
    manager.restore({"model/w": other})
    assert other.data_ptr() == address and torch.equal(other, weight) and other.requires_grad


@pytest.mark.parametrize(("is_tier", "flag"), [(False, "--async_checkpointing=0"), (True, "--in_memory_checkpointing")])
def test_copies_that_the_host_cannot_hold_are_refused_beforehand(tmp_path: Path, is_tier: bool, flag: str) -> None:
    """Expanded from one number: 2^46 bytes of values without the memory, as a model too large would ask for."""
    tensors = {"model/w": torch.zeros(()).expand(2**22, 2**22)}
    memory_dir = tmp_path / "memory" if is_tier else None
    if memory_dir:
        memory_dir.mkdir()
    manager = manager_of(disk(tmp_path / "disk"), asynchronous=True, memory_dir=memory_dir)
    with pytest.raises(StorageError, match=rf"found .* free in .*, expected .* TiB.*{flag}"):
        manager.begin(0, tensors, {})
    assert list(tmp_path.rglob("slot-*")) == []


def test_the_newest_valid_checkpoint_of_all_tiers_is_taken_nearest_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = {"memory_dir": tmp_path / "shm", "local_dir": tmp_path / "nvme"}
    (tmp_path / "shm").mkdir()
    first = manager_of(disk(tmp_path / "disk"), **places)
    for step in (1, 2):
        save(first, step)
    first.save(3, values(3), {"step": 3}, due=[MEMORY])

    def restored_from() -> tuple[int, str]:
        manager, found = manager_of(disk(tmp_path / "disk"), **places), blank()
        step = manager.restore(found)["step"]
        assert same(found, values(step))
        return step, manager._search.tier

    assert restored_from() == (3, "memory")
    flip(newest(tmp_path / "shm"))
    assert restored_from() == (2, "memory")
    assert "found checksum" in caplog.text and "passed over" in caplog.text
    for slot in (tmp_path / "shm").rglob("slot-*"):
        slot.unlink()
    assert restored_from() == (2, "local")
    flip(newest(tmp_path / "nvme"))
    assert restored_from() == (2, "disk")


def newest(folder: Path) -> Path:
    """The file whose blob has the highest step."""
    from hypershard.checkpoint.memory_files import scan

    (root,) = folder.glob("hypershard-*/*")
    return max(scan(root), key=lambda found: found[1].step)[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 + 40] ^= 1
    path.write_bytes(content)


def test_blobs_of_an_abandoned_timeline_are_never_taken(tmp_path: Path) -> None:
    """Step 3 is lost, the run goes on from 2 and saves its own 3; then a copy of the old 5 comes back."""
    shm = tmp_path / "shm"
    shm.mkdir()
    first = manager_of(disk(tmp_path / "disk"), memory_dir=shm)
    save(first, 2)
    first.save(5, values(50), {"step": 5}, due=[MEMORY])
    kept = {path: path.read_bytes() for path in shm.rglob("slot-*")}
    for path in kept:
        path.unlink()
    second = manager_of(disk(tmp_path / "disk"), memory_dir=shm)
    assert second.restore(blank())["step"] == 2
    second.begin(2, values(2), {})
    second.save(3, values(3), {"step": 3}, due=[MEMORY])
    for number, content in enumerate(kept.values()):
        path = next(shm.glob("hypershard-*/*")) / "copies" / "rank-00000" / f"slot-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    third, found = manager_of(disk(tmp_path / "disk"), memory_dir=shm), blank()
    assert third.restore(found)["step"] == 3
    assert same(found, values(3))


def test_places_of_different_runs_are_not_mixed(tmp_path: Path) -> None:
    for name in "ab":
        save(manager_of(disk(tmp_path / name)), 1)
    both = manager_of(disk(tmp_path / "a"), disk(tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"a \(run \w+\) and .*b \(run \w+\) hold different runs"):
        both.restore(blank())


def test_the_last_save_to_a_free_tier_does_not_wait_for_one_under_way(tmp_path: Path) -> None:
    """As a disk beside an upload: the disk has the last step while the upload of an earlier one still runs."""
    slow, fast = HeldTier(tmp_path / "slow"), disk(tmp_path / "fast")
    manager = manager_of(slow, fast, asynchronous=True, home=tmp_path)
    slow.place.store.__dict__["name"] = "slow"
    manager.begin(0, values(0), {})
    manager.save(1, values(1), {}, due=["slow"])
    end = threading.Thread(target=manager.save_last, args=(2, values(2), {}))
    end.start()
    wait_until(lambda: steps_in(fast) == [2])
    assert steps_in(slow) == [] and end.is_alive()
    slow.go.set()
    end.join(30)
    assert steps_in(slow) == [2, 1]


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Bucket(DiskStore):
    """A place that can be out of reach."""

    is_out = False

    def contents(self) -> dict[str, dict[str, int]]:
        if Bucket.is_out:
            raise StorageError("503")
        return super().contents()


def test_what_a_tier_that_was_out_holds_of_the_former_timeline_is_left_behind(tmp_path: Path) -> None:
    """Step 20 is in the bucket alone, which is out at the next start: that goes on from 10, and its step 15 counts."""

    def start() -> CheckpointManager:
        bucket = DurableTier(Place(Bucket(tmp_path / "s3", "s3", True)))
        manager = manager_of(disk(tmp_path / "disk"), bucket, home=tmp_path / "home", alarms=alarms)
        facts = manager.restore(blank()) or {"step": 0}
        manager.begin(facts["step"], values(0), {})
        return manager

    alarms: list[str] = []
    first = start()
    first.save(10, values(10), {"step": 10}, due=["disk"])
    first.save(20, values(20), {"step": 20}, due=["s3"])
    Bucket.is_out = True
    second = start()
    assert second._start_step == 10 and "503" in alarms[0]
    second.save(15, values(15), {"step": 15}, due=["disk"])
    Bucket.is_out = False
    third = start()
    assert third._start_step == 15
    third.save(18, values(18), {"step": 18}, due=["s3"])
    assert steps_in(third.levels[1].tier) == [18], "the abandoned one is gone"


def test_memory_of_a_run_that_was_deleted_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    save(manager_of(disk(tmp_path / "disk"), memory_dir=shm), 9)
    for path in sorted((tmp_path / "disk").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert manager_of(disk(tmp_path / "disk"), memory_dir=shm).restore(blank()) is None


def test_a_new_start_frees_what_the_former_one_left_in_memory(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    for _ in range(2):
        manager = manager_of(home=tmp_path / "home", memory_dir=shm)
        save(manager, 1)
        assert len(list(shm.rglob("slot-*"))) == 2


def test_slots_of_the_same_size_are_taken_over_and_the_resumed_one_is_overwritten_last(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    first = manager_of(home=tmp_path / "home", memory_dir=shm)
    for step in (1, 2):
        save(first, step)
    second = manager_of(home=tmp_path / "home", memory_dir=shm)
    assert second.restore(blank())["step"] == 2
    second.begin(2, values(2), {})
    assert len(list(shm.rglob("slot-*"))) == 2
    slot, _ = second._nodes.stage(take(values(3)), lineage=second._lineage, start_step=2)
    assert sorted(one.table.step for one in second._nodes._pool.slots if one.table) == [2]
    assert slot.table is None
    assert manager_of(home=tmp_path / "home", memory_dir=shm).restore(blank())["step"] == 2, "the new one is not whole"


def test_slots_of_other_sizes_are_given_back_once_the_new_ones_count(tmp_path: Path) -> None:
    """As after a change of the number of ranks: the old slots hold all there is until there is something newer."""
    (tmp_path / "shm").mkdir()
    places = {"home": tmp_path / "home", "memory_dir": tmp_path / "shm"}
    large = {"model/w": torch.arange(100_000.0)}
    save(manager_of(**places), 1, large)
    manager = manager_of(**places)
    assert manager.restore({"model/w": torch.zeros(100_000)}) is not None
    small = {"model/w": torch.arange(10.0)}
    manager.begin(1, small, {"step": 1})
    sizes = [len({path.stat().st_size for path in (tmp_path / "shm").rglob("slot-*")})]
    for step in (2, 3, 4):
        save(manager, step, small)
        sizes.append(len({path.stat().st_size for path in (tmp_path / "shm").rglob("slot-*")}))
    assert sizes == [2, 2, 2, 1]


def take(tensors: dict[str, torch.Tensor]) -> Snapshot:
    from hypershard.checkpoint.snapshot import take_snapshot

    return take_snapshot(tensors)


def test_hyperpods_daemon_brings_back_what_the_node_lost_and_is_missed_with_an_alarm(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()
    with hyperpod_daemon() as daemon:
        places = {"home": tmp_path / "home", "memory_dir": tmp_path / "shm", "hyperpod_url": daemon.url}
        alarms: list[str] = []
        first = manager_of(**places, alarms=alarms)
        for step in (1, 2):
            save(first, step)
        assert alarms == []
        for slot in (tmp_path / "shm").rglob("slot-*"):
            slot.unlink()
        second, found = manager_of(**places, alarms=alarms), blank()
        assert second.restore(found)["step"] == 2 and same(found, values(2))
        assert second._search.tier == "hyperpod"
        second.begin(2, values(2), {})
        with daemon.refusing():
            save(second, 3)
        assert len(alarms) == 1 and "step 3: not in HyperPod's memory" in alarms[0]
        third, found = manager_of(**places), blank()
        assert third.restore(found)["step"] == 3, "the node's own memory has it"


def test_full_shared_memory_is_an_error_with_figures(small_disk: Path, tmp_path: Path) -> None:
    tensors = {"model/big": torch.zeros(300_000)}
    with pytest.raises(StorageError, match=r"found .* free in .*, expected .*--in_memory_checkpointing_freq=0"):
        manager_of(home=tmp_path, memory_dir=small_disk).begin(0, tensors, {})


def test_a_busy_tier_is_saved_to_as_soon_as_it_is_free() -> None:
    cadence = Cadence(5)
    found = [step for step in range(1, 21) if cadence.is_due(step, asked=False, is_busy=5 < step < 12)]
    assert found == [5, 12, 15, 20]


def test_asked_and_off() -> None:
    never, only_when_asked = Cadence(0), Cadence(None)
    assert not never.is_due(5, asked=True, is_busy=False)
    assert [s for s in range(9) if only_when_asked.is_due(s, asked=s == 4, is_busy=False)] == [4]


def test_automatic_interval_is_measured_then_fitted() -> None:
    cadence = Cadence("auto")
    assert [s for s in range(1, 15) if cadence.is_due(s, asked=False, is_busy=False)] == [10]
    assert cadence.awaits_measure
    text = cadence.measure(Measured(0.1, 4.0), step_seconds=1.0, failure_seconds=3600.0)
    assert not cadence.awaits_measure
    assert cadence.every == 27, "sqrt(2 * 0.1 * 3600) = 26.8 s by Young, a little more by Daly, less the save"
    assert "every 27 steps" in text and "Daly" in text
    cadence.every = None
    cadence.is_due(10, asked=False, is_busy=False)
    cadence.measure(Measured(0.1, 100.0), step_seconds=1.0, failure_seconds=3600.0)
    assert cadence.every == 125, "no save may be due before the last one is written"
    cadence.is_due(125, asked=False, is_busy=False)
    cadence.measure(Measured(2.0, 1.0), step_seconds=1.0, failure_seconds=3600.0)
    assert cadence.every == 200, "stalls take at most a hundredth"
