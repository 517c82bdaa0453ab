"""Saves beside the training to every tier that is due, restores the newest valid checkpoint, keeps as many as asked."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError, StorageError
from ..log import logger
from .cadence import Cadence, Measured
from .durable import DurableTier
from .lane import Lane
from .lineage import Lineage, next_lineage
from .manifest import find_place
from .memory import NodeTiers
from .peers import Peers
from .policy import seconds_to_stop, steps_to_delete
from .restore import Search, restore_newest
from .slots import Slot
from .snapshot import Snapshot, Snapshots
from .stores import RUN_FILE, Store, run_of
from .tier import CheckpointRecord, Tier

MEMORY, LOCAL = "memory", "local"  # the tiers on the nodes among what is due
NODE_TIERS = frozenset((MEMORY, LOCAL))


@dataclass
class Level:
    """A durable tier in use: how often it is saved to, what it keeps, and the save under way."""

    tier: DurableTier
    cadence: Cadence
    keep: int
    keep_every: int | None = None
    keep_best: bool = False
    lane: Lane = field(default_factory=Lane)

    @property
    def name(self) -> str:
        return self.tier.name


@dataclass(frozen=True)
class SaveStats:
    """One finished save to one tier: how long training stood still, how long writing took, and this rank's bytes."""

    step: int
    stall_seconds: float
    write_seconds: float
    size_bytes: int


class CheckpointManager:
    """What training talks to. All ranks call the same methods in the same order; `control` is theirs alone.

    `home` are the places that know which run this is (the checkpoint directory, and the bucket where there is one).
    `alarm(text)` is told of failures that do not stop the training: all but those of a run's only tier.
    """

    def __init__(
        self,
        nodes: NodeTiers,
        levels: Sequence[Level],
        *,
        home: Sequence[Store],
        memory: Cadence,
        local: Cadence,
        control: Peers,
        asynchronous: bool,
        failure_seconds: float,
        alarm: Callable[[str], None],
    ):
        self.levels = list(levels)
        # Small files, by name, that lie beside the checkpoints so that a run can go on elsewhere.
        self.belongings: Mapping[str, bytes] = {}
        self.last_saves: dict[str, SaveStats] = {}
        self.last_stall_seconds = 0.0
        self._nodes = nodes
        self._home = home
        self._memory = memory
        self._local = local
        self._node_lane = Lane()
        self._snapshots = Snapshots()
        self._control = control
        self._asynchronous = asynchronous
        self._failure_seconds = failure_seconds
        self._step_seconds = 0.0
        self._best_step: int | None = None
        self._alarm = alarm
        self._run: str | None = None
        self._lineage = Lineage(1, "")
        self._search = Search()
        self._start_step = 0
        self._begun = False
        self._committed = threading.Event()
        self._committed.set()

    # --- restoring -------------------------------------------------------------------------------------------

    def restore(self, tensors: Mapping[str, torch.Tensor], *, source: str | None = None) -> dict[str, Any] | None:
        """Fill `tensors` in place from the newest valid checkpoint and return its facts; None when there is none.

        `source` is a folder of checkpoints, a run directory, one step's directory, or a URI of one of them; None:
        this run's own tiers. See `restore_newest` for what is raised.
        """
        if source is None:
            self._run = self._find_run(self._home)
            durable: list[Tier] = [level.tier for level in self.levels]
            on_nodes = self._nodes.open(self._run) if self._run else []
        else:
            place = find_place(source)
            durable = [DurableTier(place, group=self._control.group)]
            run = self._find_run([place.store]) if place.folder is None else None
            on_nodes = self._nodes.open(run) if run else []
            own_run = self._find_run(self._home)
            self._run = own_run if own_run == run else None
        self._search = restore_newest([*on_nodes, *durable], tensors, is_own=source is None)
        if self._search.record is None:
            return None
        if self._control.is_main:
            logger.info(f"restored step {self._search.record.step} from {self._search.record.location}")
        return self._search.facts

    def _find_run(self, stores: Sequence[Store]) -> str | None:
        """The id of the run that lives in `stores`; None when there is none yet, or no store can be asked.

        Raises CheckpointError when they hold different ones.
        """

        def find() -> str | None:
            found: dict[str, str] = {}
            for store in stores:
                with contextlib.suppress(StorageError):
                    if (run := run_of(store)) is not None:
                        found.setdefault(run, store.location)
            if len(found) > 1:
                places = " and ".join(f"{location} (run {run})" for run, location in found.items())
                raise CheckpointError(
                    f"{places} hold different runs; give each run a --checkpoint_dir and --s3_tier_base_path of its own"
                )
            return next(iter(found), None)

        return self._control.on_main(find)

    # --- before training -------------------------------------------------------------------------------------

    def begin(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Say that training starts after `step`, before it does, so that trouble comes now and not at the first save.

        Raises StorageError when a place cannot be written or is not shared, or memory does not suffice; CheckpointError
        when a place holds newer checkpoints than `step`: they are of another run, and the next resume would take them
        for this one's. Does nothing, aloud, when no tier is on.
        """
        if not self.saves:
            logger.warning("no checkpoint tier is on: nothing will be saved, and a stop loses the run")
            return
        for level in self.levels:
            self._begin_level(level, step)
        self._lineage = self._control.on_main(
            lambda: next_lineage(self._search.lineages, is_sure=not self._search.silent)
        )
        is_new = self._run is None or self._search.record is None
        if is_new and (former := self._find_run(self._home)) is not None:
            self._nodes.open(former)  # whatever it left on the nodes is of no use any more
            self._nodes.forget()
        self._run = self._control.on_main(lambda: self._claim_run(is_new=is_new))
        self._nodes.open(self._run)
        self._start_step = step
        if self._asynchronous or self._has_node_tier:
            readers = len(self.levels) if self._asynchronous else 0
            self._nodes.reserve(self._snapshots.take(tensors), facts, num_readers=readers)
        self._begun = True

    def _begin_level(self, level: Level, step: int) -> None:
        if self._search.record is not None and level.name in self._search.silent:
            # Asking again would take as long as it did.
            self._alarm_once(f"{level.name} could not be asked at the start: {self._search.silent[level.name]}")
            return
        try:
            level.tier.probe()
            newer = [record for record in level.tier.list() if record.step > step and not self._is_left(record)]
        except StorageError as error:
            # A run that goes on must not wait for a bucket that is out; one that starts should learn of it now.
            if self._search.record is None or not self._can_miss(level):
                raise
            self._alarm_once(f"{level.name} cannot be used at the start: {error}")
            return
        if newer:
            raise CheckpointError(
                f"{newer[0].location} is newer than where this training starts (step {step}), so a later resume would "
                f"take it for this run's: choose another place, resume from it, or delete it"
            )

    def _is_left(self, record: CheckpointRecord) -> bool:
        """Whether a checkpoint is none to go on from: damaged, or of a timeline that this run left before."""
        begun_from = self._search.record
        is_abandoned = self._search.is_own and begun_from is not None and record.lineage < begun_from.lineage
        return is_abandoned or record.location in self._search.refused

    def _claim_run(self, *, is_new: bool) -> str:
        """This run's id, told with its belongings to all its homes."""
        run = secrets.token_hex(8) if is_new or self._run is None else self._run
        for store in self._home:
            if store.name in self._search.silent:
                continue
            try:
                store.write("", RUN_FILE, f"{run}\n".encode())
                for name, content in self.belongings.items():
                    folder, _, file = name.rpartition("/")
                    store.write(folder, file, content)
            except StorageError as error:
                if is_new:
                    raise
                self._alarm(str(error))
        return run

    # --- while training --------------------------------------------------------------------------------------

    @property
    def saves(self) -> bool:
        """Whether anything is ever saved."""
        return self._has_node_tier or any(level.cadence.is_on for level in self.levels)

    @property
    def _has_node_tier(self) -> bool:
        return self._memory.is_on or self._local.is_on

    def flags(self) -> list[float]:
        """Which of this rank's savers are at work, to be summed over the ranks: see `due`."""
        return [float(lane.is_busy) for lane in (self._node_lane, *(level.lane for level in self.levels))]

    def due(
        self, step: int, busy: Sequence[bool], *, asked: bool, best_step: int | None, step_seconds: float
    ) -> list[str]:
        """Which tiers are to be saved to after `step`, the same on all ranks.

        `busy` are the `flags` of all ranks: a tier whose last save any rank still writes is saved to later. `asked` is
        a wish to save to the durable tiers now. Levels with `keep_best` never delete the checkpoint of `best_step`;
        where that is this step, the first of them saves it even if it has to be waited for.
        """
        self._step_seconds, self._best_step = step_seconds, best_step
        names = [
            name
            for name, cadence in ((MEMORY, self._memory), (LOCAL, self._local))
            if cadence.is_due(step, asked=False, is_busy=busy[0])
        ]
        for level, is_busy in zip(self.levels, busy[1:], strict=True):
            # Every save goes through the slots, and those are free when the nodes' own tiers have written theirs.
            if level.cadence.is_due(step, asked=asked, is_busy=is_busy or busy[0]):
                names.append(level.name)
        keepers = [level.name for level in self.levels if level.keep_best]
        if step == best_step and keepers and keepers[0] not in names:
            names.append(keepers[0])
        for name, cadence, is_busy in self._measurable(busy):
            if cadence.awaits_measure and not is_busy and name not in names:
                self._measure(name, cadence, step_seconds)
        return names

    def _measurable(self, busy: Sequence[bool]) -> list[tuple[str, Cadence, bool]]:
        levels = [(level.name, level.cadence, is_busy) for level, is_busy in zip(self.levels, busy[1:], strict=True)]
        return [(MEMORY, self._memory, busy[0]), *levels]

    def _measure(self, name: str, cadence: Cadence, step_seconds: float) -> None:
        """Fit an automatic interval to rank 0's last save. Collective, some times at a run's start."""
        last = self.last_saves.get(name)
        cost = Measured(last.stall_seconds, last.write_seconds) if last else Measured(step_seconds, step_seconds)
        cost, seconds = self._control.on_main(lambda: (cost, step_seconds))
        text = cadence.measure(cost, step_seconds=seconds, failure_seconds=self._failure_seconds)
        logger.info(f"checkpoints ({name}) {text}")

    @property
    def reserve_seconds(self) -> float:
        """How long before a time limit to stop, so that the last save fits; this rank's view."""
        took = [self.last_saves[level.name].write_seconds for level in self.levels if level.name in self.last_saves]
        return seconds_to_stop(write_seconds=max(took, default=0.0), step_seconds=self._step_seconds)

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], *, due: Sequence[str]
    ) -> None:
        """Save `tensors` (DTensors: this rank's shards; plain: the same on all ranks) and the JSON-able `facts`.

        On return the values are safe from the next step, on a GPU after `settle`. Saves still running to the tiers in
        `due` are waited for.
        """
        started_at = time.perf_counter()
        assert self._begun, "begin() comes first"
        wanted = [level for level in self.levels if level.name in due]
        for level in wanted:
            self._finish_level(level)
        snapshot = self._snapshots.take(tensors)
        if not (self._asynchronous or self._has_node_tier):
            for level in wanted:
                self._to_level(level, _Save(step, dict(facts), self._lineage, started_at, None), snapshot, None)
        else:
            self._finish_nodes()
            slot, snapshot = self._nodes.stage(snapshot, lineage=self._lineage, start_step=self._start_step)
            stall_seconds = time.perf_counter() - started_at if self._asynchronous else None
            save = _Save(step, dict(facts), self._lineage, started_at, stall_seconds)
            for _ in wanted:
                self._nodes.pin(slot)
            self._to_nodes(slot, save, snapshot, to_local=LOCAL in due and self._local.is_on)
            for level in wanted:
                self._to_level(level, save, snapshot, slot)
        self.last_stall_seconds = time.perf_counter() - started_at

    def save_last(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> bool:
        """Wait for all saves, save to every tier that does not have `step`, and wait again; whether one had to be made.

        Raises what the durable tiers met when none of them has `step` then.
        """
        if not self.saves:
            return False
        self._finish_nodes()
        busy = self._control.together(lambda: [level.lane.is_busy for level in self.levels])
        is_busy = [any(flags) for flags in zip(*busy, strict=True)]
        # What is free comes first: a disk must not wait for an upload under way.
        free = [level for level, waits in zip(self.levels, is_busy, strict=True) if not waits]
        errors: list[Exception] = []
        has_saved = False
        for levels in (free, [level for level in self.levels if level not in free]) if self.levels else (free,):
            errors += self._errors_of(levels)
            due = self._control.on_main(partial(self._without, step, levels))
            if due or (not self.levels and self._has_node_tier):
                self.save(step, tensors, facts, due=[*due, MEMORY, LOCAL])
                has_saved = True
            errors += self._errors_of(levels)
        self._finish_nodes()
        is_safe = not self.levels or any(self._has(level, step) for level in self.levels)
        if errors and not is_safe:
            raise errors[-1]
        for error in errors:
            self._alarm_once(f"a save failed: {error}")
        return has_saved

    def _without(self, step: int, levels: Sequence[Level]) -> list[str]:
        return [level.name for level in levels if not self._has(level, step)]

    def _has(self, level: Level, step: int) -> bool:
        last = self.last_saves.get(level.name)
        is_where_it_began = self._search.is_own and self._search.tier == level.name and self._start_step == step
        return not level.cadence.is_on or is_where_it_began or (last is not None and last.step == step)

    def _to_nodes(self, slot: Slot, save: _Save, snapshot: Snapshot, *, to_local: bool) -> None:
        """Commit the slot, hand out its copies and write it to the local disk, in the background."""
        self._committed.clear()

        def spread() -> None:
            began_at = time.perf_counter()
            try:
                self._commit(slot, save)
                if self._has_node_tier:
                    for trouble in self._nodes.spread(slot):
                        self._alarm(f"step {save.step}: {trouble}")
                if to_local:
                    self._nodes.write_local(slot)
                self._nodes.count_save()
            finally:
                self._nodes.release(slot)
            self._note(MEMORY, save, snapshot, began_at)

        self._node_lane.start(spread, in_background=self._asynchronous)

    def _commit(self, slot: Slot, save: _Save) -> None:
        try:
            slot.wait()
            if self._has_node_tier:
                self._nodes.commit(slot, save.step, save.facts, save.lineage)
        finally:
            self._committed.set()

    def _to_level(self, level: Level, save: _Save, snapshot: Snapshot, slot: Slot | None) -> None:
        def write() -> None:
            began_at = time.perf_counter()
            try:
                if slot is not None:
                    slot.wait()
                record = level.tier.save(save.step, snapshot, save.facts, save.lineage)
            finally:
                if slot is not None:
                    self._nodes.release(slot)
            self._prune(level, record)
            self._note(level.name, save, snapshot, began_at)

        level.lane.start(write, in_background=self._asynchronous)
        if not self._asynchronous:
            self._finish_level(level)

    def _note(self, name: str, save: _Save, snapshot: Snapshot, began_at: float) -> None:
        seconds = time.perf_counter() - began_at
        stall = time.perf_counter() - save.started_at if save.stall_seconds is None else save.stall_seconds
        self.last_saves[name] = SaveStats(save.step, stall, seconds, snapshot.size_bytes)

    def _prune(self, level: Level, saved: CheckpointRecord) -> None:
        """Delete what the new checkpoint makes superfluous: old ones, earlier saves of its step, abandoned ones.

        Later steps are left alone unless they are of a timeline that this run has left.
        """
        refused = self._search.refused
        records = level.tier.list()
        valid = {one.step for one in records if one.step <= saved.step and one.location not in refused}
        old = set(steps_to_delete(valid, keep=level.keep, keep_every=level.keep_every))
        for record in reversed(records):
            is_superseded = record.step == saved.step and record.attempt < saved.attempt
            is_abandoned = record.step > saved.step and record.lineage < saved.lineage
            is_refused = record.step <= saved.step and record.location in refused
            is_old = record.step in old and not (level.keep_best and record.step == self._best_step)
            if is_old or is_superseded or is_abandoned or is_refused:
                level.tier.delete(record)

    def settle(self) -> None:
        """Return when the last save's values are copied and its blob is whole.

        Called before the all-reduce that ends each step's gradients, so that no rank changes its weights before every
        rank's last memory checkpoint is whole.
        """
        self._committed.wait()

    def poll(self) -> None:
        """Deal with background saves that failed; returns at once while others still run."""
        for level in self.levels:
            if not level.lane.is_busy:
                self._finish_level(level)
        if not self._node_lane.is_busy:
            self._finish_nodes()

    def finish(self) -> None:
        """Wait for the saves under way; raises what the only tier met."""
        self._finish_nodes()
        for level in self.levels:
            self._finish_level(level)

    def close(self, *, is_complete: bool) -> None:
        """The end of a run that all ranks reach. `is_complete`: it will not go on, so its memory is given back."""
        if is_complete and any(level.cadence.is_on for level in self.levels):
            self._nodes.forget(is_over=True)
        self._nodes.close()

    def _errors_of(self, levels: Sequence[Level]) -> list[Exception]:
        return [error for level in levels if (error := level.lane.finish()) is not None]

    def _finish_nodes(self) -> None:
        if error := self._node_lane.finish():
            self._alarm(f"a save on the nodes failed: {error}")

    def _finish_level(self, level: Level) -> None:
        """Training goes on without a save that failed as long as another tier takes its saves."""
        if error := level.lane.finish():
            if not self._can_miss(level):
                raise error
            self._alarm_once(f"a save to {level.name} failed: {error}")

    def _alarm_once(self, text: str) -> None:
        """An alarm about what all ranks met alike."""
        if self._control.is_main:
            self._alarm(text)

    def _can_miss(self, level: Level) -> bool:
        return len(self.levels) > 1 or self._memory.is_on or level.tier.store.is_remote


@dataclass(frozen=True)
class _Save:
    """One save on its way to several tiers."""

    step: int
    facts: dict[str, Any]
    lineage: Lineage
    started_at: float
    stall_seconds: float | None  # None: training stands still until all is written
