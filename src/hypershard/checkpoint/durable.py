"""Checkpoints that outlive the job: a folder per save, in a shared directory or a bucket, committed by its manifest.

Every save goes to a folder that was not there before (`step-00000060`, and `step-00000060.2` when that step is
saved again), because writing over a checkpoint could leave new data under an old layout. Nothing is renamed:
until the manifest is written the folder does not count, so there is no moment without a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.metadata import Metadata

from ..errors import DamagedCheckpoint, StorageError
from ..log import logger
from .dcp_format import Part, layout_bytes, part_name, plan_globally, write_part
from .lineage import Lineage
from .manifest import FACTS, METADATA, Manifest, Place, StoredCheckpoint, folder_name, now
from .metadata import check_same_model, read_metadata, read_tensors
from .peers import Peers
from .snapshot import Snapshot
from .stores import MANIFEST, Store
from .sums import FileSum, sum_of
from .tier import CheckpointRecord


def commit_folder(
    store: Store,
    folder: str,
    parts: Sequence[Part],
    *,
    metadata: Metadata,
    facts: Mapping[str, Any],
    about: Manifest,
) -> None:
    """Make a folder whose `parts` are written a checkpoint: its layout, its facts, and last the manifest.

    `about` is the manifest without files.
    """
    small = {METADATA: layout_bytes(metadata, parts), FACTS: (json.dumps(facts, indent=1) + "\n").encode()}
    files: dict[str, FileSum] = {part.file: part.sum for part in parts if part.sum is not None}
    for name, content in small.items():
        store.write(folder, name, content)
        files[name] = sum_of(content)
    store.settle(folder)
    store.write(folder, MANIFEST, dataclasses.replace(about, files=files).to_bytes(), is_new=True)


class DurableTier:
    """Checkpoints at `place`. `group` is a gloo group of all ranks used for nothing else; None: a process alone.

    `save_seconds` limits one save to a remote place; None: no limit.
    """

    def __init__(self, place: Place, *, group: dist.ProcessGroup | None = None, save_seconds: float | None = None):
        self.place = place
        self.peers = Peers(group)
        self._save_seconds = save_seconds
        self._lineages: set[Lineage] = set()
        self._planned: tuple[SavePlan, tuple[SavePlan, Metadata]] | None = None

    @property
    def store(self) -> Store:
        return self.place.store

    @property
    def name(self) -> str:
        return self.store.name

    def probe(self) -> None:
        """Raise StorageError unless rank 0 can write here and every rank sees what it wrote."""
        probe = self.peers.on_main(self.store.probe)
        try:
            seen = self.peers.together(lambda: self.store.sees(probe))
        finally:
            if self.peers.is_main:
                with contextlib.suppress(StorageError):
                    self.store.end_probe(probe)
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise StorageError(
                f"{self.store.location} is not one place for all ranks: a file that rank 0 wrote is not seen by "
                f"rank(s) {', '.join(map(str, blind))}; expected --checkpoint_dir on a disk that all nodes share"
            )

    def save(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], lineage: Lineage) -> CheckpointRecord:
        """Write a checkpoint. Raises StorageError or CheckpointError and leaves older checkpoints as they were."""
        attempt = self.peers.on_main(lambda: self._new_folder(step))
        stored = StoredCheckpoint(self.store, folder_name(step, attempt), step, attempt, {})
        try:
            try:
                plan, metadata = self._plan(snapshot.plan)
                parts = self.peers.together(lambda: self._write_part(stored.folder, plan, snapshot))
            except StorageError as error:
                # Added here because it differs between ranks, and one failure should read the same on all.
                room = self.store.room(snapshot.size_bytes)
                raise StorageError(f"{error}; {room}. Older checkpoints are untouched") from error
            self.peers.on_main(lambda: self._commit(stored, parts, metadata, {**facts, "step": step}, lineage))
        except Exception:  # whatever failed, half a checkpoint must not stay
            if self.peers.is_main:
                with contextlib.suppress(StorageError):  # the error that made it useless is on its way
                    self.store.remove(stored.folder)
            raise
        return CheckpointRecord(step, stored.location, stored.attempt, lineage)

    def _new_folder(self, step: int) -> int:
        """Make a fresh folder for `step` and return its attempt.

        Torn ones of earlier crashes go first: only one save runs at a time here.
        """
        existing = self.place.stored()
        for torn in existing:
            if not torn.is_finished:
                logger.info(f"removing the unfinished checkpoint {torn.location}")
                self.store.remove(torn.folder)
        attempt = 1 + max((one.attempt for one in existing if one.step == step), default=0)
        self.store.make(folder_name(step, attempt))
        return attempt

    def _plan(self, plan: SavePlan) -> tuple[SavePlan, Metadata]:
        """What this rank writes, and the layout; planned with the other ranks when it is not as last time."""
        known = self._planned is not None and self._planned[0] == plan
        if not all(self.peers.together(lambda: known)):
            plans = self.peers.together(lambda: plan)
            all_plans, metadata = plan_globally(plans)
            self._planned = (plan, (all_plans[self.peers.rank], metadata))
        assert self._planned is not None
        return self._planned[1]

    def _write_part(self, folder: str, plan: SavePlan, snapshot: Snapshot) -> Part:
        file = part_name(self.peers.rank)
        if not plan.items:
            return Part(file, None, {})
        with self.store.stream(folder, file, seconds=self._save_seconds) as sink:
            return write_part(plan, snapshot.parts, sink, file=file)

    def _commit(
        self,
        stored: StoredCheckpoint,
        parts: Sequence[Part],
        metadata: Metadata,
        facts: dict[str, Any],
        lineage: Lineage,
    ) -> None:
        about = Manifest(stored.step, lineage, now(), self.peers.size, str(torch.__version__), {})
        commit_folder(self.store, stored.folder, parts, metadata=metadata, facts=facts, about=about)

    def list(self) -> list[CheckpointRecord]:
        records = self.peers.on_main(lambda: [stored.record for stored in self.place.finished()])
        self._lineages = {record.lineage for record in records}
        return records

    def lineages(self) -> set[Lineage]:
        return self._lineages

    def _stored(self, record: CheckpointRecord) -> StoredCheckpoint:
        folder = folder_name(record.step, record.attempt)
        files = self.peers.on_main(lambda: self.store.contents().get(folder, {}))
        return StoredCheckpoint(self.store, folder, record.step, record.attempt, files)

    def verify(self, record: CheckpointRecord) -> None:
        """Read every byte once, the files spread over the ranks; then the layout, which must be one."""
        stored = self._stored(record)
        manifest = self.peers.on_main(stored.manifest)
        by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
        own = by_size[self.peers.rank :: self.peers.size]
        damage = self.peers.together(lambda: [text for name in own if (text := stored.damage(manifest, name))])
        if found := [text for part in damage for text in part]:
            raise DamagedCheckpoint("; ".join(found))
        self.peers.on_main(lambda: (read_metadata(stored, manifest), stored.facts(manifest), None)[2])

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        stored = self._stored(record)
        manifest = self.peers.on_main(stored.manifest)

        def read() -> None:
            metadata = read_metadata(stored, manifest)
            check_same_model(stored.location, metadata, tensors)
            read_tensors(stored, manifest, metadata, tensors)

        self.peers.together(read)
        return self.peers.on_main(lambda: stored.facts(manifest))

    def delete(self, record: CheckpointRecord) -> None:
        self.peers.on_main(lambda: self.store.remove(folder_name(record.step, record.attempt)))
