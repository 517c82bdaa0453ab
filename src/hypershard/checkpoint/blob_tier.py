"""Restoring from blobs that lie on the nodes of the job: in memory, copies of lost nodes' among them, or on disks.

Each rank's blob was committed by itself. Whether they make a checkpoint is found out here: blobs of one lineage and
step whose parts are all there, on whatever nodes, are one, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import CheckpointError, DamagedCheckpoint, StorageError
from ..log import logger
from .agent_client import AgentSource
from .blob import HEAD_BYTES, BlobTable, Item, blob_damage, read_table
from .dcp_format import Place, StoredFile, fill
from .lineage import Lineage
from .memory_files import scan
from .metadata import check_same_model
from .nodes import Nodes
from .peers import Peers
from .sums import FileSource, Source
from .tier import CheckpointRecord


@dataclass(frozen=True)
class Holding:
    """A finished blob on one node. `path` counts from the root of its tier there."""

    node: int
    path: str
    lineage: Lineage
    step: int
    rank: int
    part: int
    num_parts: int


class BlobTier:
    """Blobs of `job` below `root` on every node; `kind` is the agents' name for that folder."""

    def __init__(self, name: str, root: Path, *, kind: str, job: str, nodes: Nodes, peers: Peers):
        self.name = name
        self.peers = peers
        self._root = root
        self._kind = kind
        self._job = job
        self._nodes = nodes
        self._held: dict[tuple[Lineage, int], list[Holding]] = {}

    def list(self) -> list[CheckpointRecord]:
        found = self.peers.together(lambda: self._scan() if self._nodes.is_leader else [])
        self._held = {}
        for holding in (holding for node in found for holding in node):
            self._held.setdefault((holding.lineage, holding.step), []).append(holding)
        whole = [key for key, held in self._held.items() if _is_whole(held)]
        for lineage, step in sorted(set(self._held) - set(whole), reverse=True):
            held = self._held[lineage, step]
            parts = {holding.part for holding in held}
            logger.debug(f"step {step} in {self.name} has {len(parts)} of {held[0].num_parts} parts")
        return [
            CheckpointRecord(step, f"{self.name} step {step} (start {lineage.generation})", lineage=lineage)
            for lineage, step in sorted(whole, reverse=True)
        ]

    def _scan(self) -> Sequence[Holding]:
        return [
            Holding(
                self._nodes.own,
                str(path.relative_to(self._root)),
                table.lineage,
                table.step,
                table.rank,
                table.part,
                table.num_parts,
            )
            for path, table in scan(self._root)
            if table.job == self._job
        ]

    def lineages(self) -> set[Lineage]:
        """All timelines that were seen by `list`, of whole checkpoints or not."""
        return {lineage for lineage, _ in self._held}

    def verify(self, record: CheckpointRecord) -> None:
        """Every node reads what it holds itself; each part needs one blob that is as saved."""
        held = self._held[record.lineage, record.step]
        own = [holding for holding in held if holding.node == self._nodes.own] if self._nodes.is_leader else []
        outcomes = self.peers.together(lambda: [(holding.part, self._damage(holding)) for holding in own])
        verdicts = [verdict for node in outcomes for verdict in node]
        good = {part for part, damage in verdicts if damage is None}
        if len(good) < held[0].num_parts:
            damage = [text for part, text in verdicts if text is not None and part not in good]
            raise DamagedCheckpoint("; ".join(damage))

    def _damage(self, holding: Holding) -> str | None:
        source = FileSource(self._root / holding.path)
        try:
            table = read_table(source)
        except DamagedCheckpoint as error:
            return str(error)
        return f"{source.name} has no valid head" if table is None else blob_damage(source, table)

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        held = self._held[record.lineage, record.step]
        gathered = self.peers.together(lambda: self._own_tables(held))
        tables = {(node, path): table for tables in gathered for (node, path), table in tables.items()}
        by_part: dict[int, list[Holding]] = {}
        for holding in held:
            if (holding.node, holding.path) in tables:
                by_part.setdefault(holding.part, []).append(holding)
        if len(by_part) < held[0].num_parts:
            raise DamagedCheckpoint(f"{record.location}: found {len(by_part)} of {held[0].num_parts} parts")

        def read() -> dict[str, Any]:
            first = {part: tables[holdings[0].node, holdings[0].path] for part, holdings in by_part.items()}
            metadata, places, shapes = _layout({part: table.items for part, table in first.items()})
            check_same_model(record.location, metadata, tensors)

            def read_file(name: str, use: Callable[[StoredFile], None]) -> None:
                self._use_any(sorted(by_part[int(name)], key=self._distance), tables, use)

            fill(tensors, metadata, places, read_file, lambda index, content: _decode(content, shapes[index]))
            return dict(first[0].facts)

        return self.peers.together(read)[0]

    def _own_tables(self, held: Sequence[Holding]) -> dict[tuple[int, str], BlobTable]:
        found: dict[tuple[int, str], BlobTable] = {}
        if self._nodes.is_leader:
            for holding in held:
                if holding.node == self._nodes.own:
                    table = read_table(FileSource(self._root / holding.path))
                    # It may have been written anew since it was listed.
                    if table is not None and (table.lineage, table.step) == (holding.lineage, holding.step):
                        found[holding.node, holding.path] = table
        return found

    def _distance(self, holding: Holding) -> tuple[bool, int, str]:
        return holding.node != self._nodes.own, holding.node, holding.path

    def _use_any(
        self,
        holdings: Sequence[Holding],
        tables: Mapping[tuple[int, str], BlobTable],
        use: Callable[[StoredFile], None],
    ) -> None:
        """Read from the nearest blob of a part, and from the next one when that is damaged or out of reach."""
        damage = []
        for holding in holdings:
            source = self._source(holding)
            try:
                use(StoredFile(source, tables[holding.node, holding.path].payload, start=HEAD_BYTES))
                return
            except (DamagedCheckpoint, StorageError, OSError) as error:
                text = str(error) if isinstance(error, CheckpointError | StorageError) else f"{source.name}: {error}"
                logger.warning(f"{text}; another copy is tried")
                damage.append(text)
        raise DamagedCheckpoint("; ".join(damage))

    def _source(self, holding: Holding) -> Source:
        if holding.node == self._nodes.own:
            return FileSource(self._root / holding.path)
        return AgentSource(self._nodes.agents[holding.node], self._kind, holding.path)

    def delete(self, record: CheckpointRecord) -> None:
        held = self._held.get((record.lineage, record.step), [])

        def delete() -> None:
            for holding in held:
                if self._nodes.is_leader and holding.node == self._nodes.own:
                    (self._root / holding.path).unlink(missing_ok=True)

        self.peers.together(delete)


def _is_whole(held: Sequence[Holding]) -> bool:
    return {holding.part for holding in held} >= set(range(held[0].num_parts))


def _decode(content: memoryview, item: Item) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, item.dtype)
    if not content.nbytes:
        return torch.empty(item.sizes, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(item.sizes)


def _layout(
    items_by_part: Mapping[int, Sequence[Item]],
) -> tuple[Metadata, dict[MetadataIndex, Place], dict[MetadataIndex, Item]]:
    """All boxes of all parts as torch plans with them; a box that several parts hold is taken from the first."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, Place] = {}
    shapes: dict[MetadataIndex, Item] = {}
    for part, items in sorted(items_by_part.items()):
        for item in items:
            dtype = getattr(torch, item.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise DamagedCheckpoint(f"{item.name} has dtype {item.dtype!r}")
            entry = tensors.setdefault(
                item.name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(item.shape), [])
            )
            index = MetadataIndex(item.name, torch.Size(item.offsets))
            if index in places:
                continue
            entry.chunks.append(ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
            places[index] = Place(str(part), item.begin, item.size_bytes)
            shapes[index] = item
    return Metadata(dict(tensors)), places, shapes
