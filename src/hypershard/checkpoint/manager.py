"""Saves beside the training, restores the newest valid checkpoint, keeps as many as asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..log import logger
from .manifest import checkpoint_directory
from .policy import steps_to_delete
from .snapshot import HostBuffers, Snapshot, take_snapshot
from .tier import CheckpointRecord, Tier


@dataclass(frozen=True)
class SaveStats:
    """One finished save: how long training stood still, how long writing took, and this rank's bytes."""

    step: int
    stall_seconds: float
    write_seconds: float
    size_bytes: int


class CheckpointManager:
    """Saves to and restores from one tier. All ranks call the same methods in the same order.

    `asynchronous` copies the tensors to host memory (their own size again, on each rank) and writes from there in
    one background thread; otherwise `save` returns when the checkpoint is whole. `keep` counts the newest checkpoints.
    """

    def __init__(self, tier: Tier, *, keep: int, asynchronous: bool):
        self.tier = tier
        self.keep = keep
        self.asynchronous = asynchronous
        self.last_save: SaveStats | None = None
        self.last_stall_seconds = 0.0
        self._buffers = HostBuffers()
        self._pending: _Background | None = None
        self._refused: set[str] = set()  # locations found damaged; never counted as kept
        self._begun = False

    def begin(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Say that training starts after `step`, before it does, so that trouble comes now and not at the first save.

        Raises StorageError when the directory cannot be written or is not shared, CheckpointError when it holds
        newer checkpoints than `step`: they are of another run, and the next resume would take them for this one's.
        Allocates the host memory of asynchronous saves. `save` calls this when nobody did.
        """
        self.tier.probe()
        newer = [record for record in self.tier.list() if record.step > step and record.location not in self._refused]
        if newer:
            raise CheckpointError(
                f"{newer[0].location} is newer than where this training starts (step {step}), so a later resume would "
                f"take it for this run's: choose another --checkpoint_dir, resume from it, or delete it"
            )
        if self.asynchronous:
            self._buffers.reserve(take_snapshot(tensors))
        self._begun = True

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Save `tensors` (DTensors: this rank's shards; plain: the same on all ranks) and the JSON-able `facts`.

        Waits for the save before it and raises what that one met. On return `tensors` may change.
        """
        started_at = time.perf_counter()
        self.finish()
        if not self._begun:
            self.begin(step, tensors)
        snapshot = take_snapshot(tensors)
        if self.asynchronous:
            snapshot = self._buffers.copy(snapshot)
            self.last_stall_seconds = time.perf_counter() - started_at
            stall_seconds, kept_facts = self.last_stall_seconds, dict(facts)
            self._pending = _Background(lambda: self._write(step, snapshot, kept_facts, stall_seconds))
        else:
            self._write(step, snapshot, facts, None)
            self.last_stall_seconds = time.perf_counter() - started_at

    def _write(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], stall_seconds: float | None) -> None:
        started_at = time.perf_counter()
        record = self.tier.save(step, snapshot, facts)
        self._prune(record)
        seconds = time.perf_counter() - started_at
        stall = seconds if stall_seconds is None else stall_seconds
        self.last_save = SaveStats(step, stall, seconds, snapshot.size_bytes)

    def _prune(self, saved: CheckpointRecord) -> None:
        """Delete what the new checkpoint makes superfluous. Later steps than its own are not this run's to delete."""
        records = [record for record in self.tier.list() if record.step <= saved.step]
        valid_steps = {record.step for record in records if record.location not in self._refused}
        old_steps = set(steps_to_delete(valid_steps, self.keep))
        for record in reversed(records):
            superseded = record.step == saved.step and record.attempt < saved.attempt
            if record.step in old_steps or superseded or record.location in self._refused:
                self.tier.delete(record)

    def poll(self) -> None:
        """Raise the error of a background save that failed; returns at once while one still runs."""
        if self._pending is not None and self._pending.is_done:
            self.finish()

    def finish(self) -> None:
        """Wait for the pending save, if any, and raise what it met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, tensors: Mapping[str, torch.Tensor], *, from_dir: Path | None = None) -> dict[str, Any] | None:
        """Fill `tensors` in place from the newest valid checkpoint and return its facts; None when there is none.

        `from_dir` is a folder of checkpoints, a run directory, or one step's directory; None: the tier's own. A
        damaged checkpoint is named in a warning and passed over. Raises CheckpointError when the newest valid one is
        of another model, and when there are checkpoints but none is valid: starting anew would hide the loss.
        """
        self.finish()
        tier = self.tier if from_dir is None else self.tier.at(checkpoint_directory(Path(from_dir)))
        damage = []
        for record in tier.list():
            try:
                tier.verify(record)
            except CheckpointError as error:
                self._refused.add(record.location)
                damage.append(f"{record.location}: {error}")
                if tier.peers.is_main:
                    logger.warning(f"checkpoint {record.location} is damaged and passed over: {error}")
                continue
            return tier.load(record, tensors)
        if damage:
            raise CheckpointError(f"no checkpoint is valid, found {len(damage)} damaged: {'; '.join(damage)}")
        return None


class _Background:
    """One action in a thread of its own. A daemon: a training that failed does not wait for its checkpoint."""

    def __init__(self, action: Callable[[], None]):
        self._error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # handed to the training thread, whatever it is
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
