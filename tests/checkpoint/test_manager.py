from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import blank, same, values

from hypershard.checkpoint.local import LocalTier
from hypershard.checkpoint.manager import CheckpointManager
from hypershard.checkpoint.snapshot import Snapshot, take_snapshot
from hypershard.checkpoint.tier import CheckpointRecord
from hypershard.errors import CheckpointError, StorageError


class HeldTier(LocalTier):
    """The real tier, whose saves wait for `go` and fail once when `broken`."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.go = threading.Event()
        self.broken = False

    def save(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any]) -> CheckpointRecord:
        assert self.go.wait(30)
        if self.broken:
            raise StorageError("the disk is gone")
        return super().save(step, snapshot, facts)


def steps_in(tier: LocalTier) -> list[int]:
    return [record.step for record in tier.list()]


def test_background_save_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    manager = CheckpointManager(tier, keep=3, asynchronous=True)
    tensors, facts = values(1), {"tokens": 7}
    manager.save(1, tensors, facts)
    for tensor in tensors.values():
        tensor.fill_(5)
    facts["tokens"] = 8
    manager.poll()
    assert steps_in(tier) == []
    tier.go.set()
    manager.finish()
    found = blank()
    assert manager.restore(found) == {"step": 1, "tokens": 7}
    assert same(found, values(1))


def test_host_buffers_are_reused(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=True)
    manager.begin(0, values(0))
    addresses = {index: buffer.data_ptr() for index, buffer in manager._buffers._buffers.items()}
    for step in (1, 2):
        manager.save(step, values(step), {})
        manager.finish()
    assert {index: buffer.data_ptr() for index, buffer in manager._buffers._buffers.items()} == addresses
    found = blank()
    manager.restore(found)
    assert same(found, values(2))


def test_saving_in_place_copies_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=False)
    tensors = values(1)
    manager.save(1, tensors, {})
    assert steps_in(manager.tier) == [1] and manager._buffers._buffers == {}
    parts = {index.fqn: part.data_ptr() for index, part in take_snapshot(tensors).parts.items()}
    assert parts == {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_failed_background_save_is_raised_once_and_the_next_one_works(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    tier.go.set()
    tier.broken = True
    manager = CheckpointManager(tier, keep=3, asynchronous=True)
    manager.save(1, values(1), {})
    manager._pending._thread.join()
    with pytest.raises(StorageError, match="the disk is gone"):
        manager.poll()
    tier.broken = False
    manager.save(2, values(2), {})
    manager.finish()
    assert steps_in(tier) == [2]


def test_next_save_raises_what_the_one_before_met(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    tier.go.set()
    tier.broken = True
    manager = CheckpointManager(tier, keep=3, asynchronous=True)
    manager.save(1, values(1), {})
    with pytest.raises(StorageError, match="the disk is gone"):
        manager.save(2, values(2), {})


def test_stats(tmp_path: Path) -> None:
    tier = HeldTier(tmp_path)
    manager = CheckpointManager(tier, keep=3, asynchronous=True)
    manager.save(4, values(1), {})
    assert manager.last_save is None
    tier.go.set()
    manager.finish()
    assert manager.last_save.step == 4
    assert manager.last_save.size_bytes == sum(tensor.nbytes for tensor in values(1).values())
    assert manager.last_save.stall_seconds == manager.last_stall_seconds > 0
    assert manager.last_save.write_seconds > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_keeps_the_newest(tmp_path: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(LocalTier(tmp_path), keep=2, asynchronous=asynchronous)
    for step in (1, 2, 3, 4):
        manager.save(step, values(step), {})
    manager.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_damaged_checkpoint_never_counts_as_kept(tmp_path: Path) -> None:
    first = CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=False)
    for step in (10, 20):
        first.save(step, values(step), {})
    (tmp_path / "step-00000020" / "facts.json").write_text("{}")
    manager = CheckpointManager(LocalTier(tmp_path), keep=1, asynchronous=False)
    assert manager.restore(blank())["step"] == 10
    manager.save(15, values(15), {})
    assert steps_in(manager.tier) == [20, 15], "the damaged one is of a later step: not this save's to delete"
    manager.save(20, values(3), {})
    assert steps_in(manager.tier) == [20]
    found = blank()
    assert manager.restore(found) is not None and same(found, values(3))


def test_second_save_of_a_step_leaves_one_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=False)
    for number in (1, 2):
        manager.save(7, values(number), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007.2"]
    found = blank()
    manager.restore(found)
    assert same(found, values(2))


def test_newer_checkpoints_of_another_run_are_refused_before_training(tmp_path: Path) -> None:
    CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=False).save(50, values(1), {})
    manager = CheckpointManager(LocalTier(tmp_path), keep=1, asynchronous=False)
    with pytest.raises(CheckpointError, match=r"step-00000050 is newer than where this training starts \(step 0\)"):
        manager.begin(0, values(1))
    with pytest.raises(CheckpointError, match="another --checkpoint_dir"):
        manager.save(5, values(1), {})
    assert steps_in(manager.tier) == [50]
    manager.begin(50, values(1))


def test_restore_from_a_run_directory_or_one_step(tmp_path: Path) -> None:
    source = CheckpointManager(LocalTier(tmp_path / "run" / "checkpoints"), keep=3, asynchronous=False)
    for step in (1, 2):
        source.save(step, values(step), {})
    manager = CheckpointManager(LocalTier(tmp_path / "other"), keep=3, asynchronous=False)
    assert manager.restore(blank()) is None
    assert manager.restore(blank(), from_dir=tmp_path / "run")["step"] == 2
    assert manager.restore(blank(), from_dir=tmp_path / "run" / "checkpoints")["step"] == 2
    found = blank()
    assert manager.restore(found, from_dir=tmp_path / "run" / "checkpoints" / "step-00000001")["step"] == 1
    assert same(found, values(1))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        manager.restore(blank(), from_dir=tmp_path / "run" / "checkpoints" / "step-00000001")


def test_restores_in_place_into_parameters(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalTier(tmp_path), keep=3, asynchronous=False)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    manager.save(1, {"model/w": weight}, {})
    other = torch.nn.Parameter(torch.zeros(4, 4))
    address = other.data_ptr()
    manager.restore({"model/w": other})
    assert other.data_ptr() == address and torch.equal(other, weight) and other.requires_grad


def test_async_copies_that_the_host_cannot_hold_are_refused_beforehand(tmp_path: Path) -> None:
    """Expanded from one number: 2^46 bytes of values without the memory, as a model too large would ask for."""
    tensors = {"model/w": torch.zeros(()).expand(2**22, 2**22)}
    manager = CheckpointManager(LocalTier(tmp_path), keep=1, asynchronous=True)
    with pytest.raises(StorageError, match=r"64.00 TiB in host memory, found .*--async_checkpointing=0"):
        manager.begin(0, tensors)
