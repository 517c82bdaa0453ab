"""Restoring from blobs that lie on the nodes of the job: in memory, copies of lost nodes' among them, or on disks.

Each rank's blob was committed by itself. Whether they make a checkpoint is found out here: blobs of one lineage and
step whose parts are all there, on whatever nodes, are one, for any number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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

from ..errors import DamagedCheckpoint, StorageError
from ..log import logger
from .agent_client import AgentSource
from .blob import HEAD_BYTES, BlobTable, Item, blob_damage
from .dcp_format import Place, StoredFile, fill
from .hyperpod import HyperPodMemory
from .lineage import Lineage
from .memory_files import scan
from .metadata import check_same_model
from .nodes import Nodes
from .peers import Peers
from .snapshot import dtype_of
from .sums import FileSource, Source
from .tier import CheckpointRecord


@dataclass(frozen=True)
class Holding:
    """A finished blob. `path` tells it from others on its node."""

    node: int
    path: str
    lineage: Lineage
    step: int
    rank: int
    part: int
    num_parts: int


class BlobTier(ABC):
    """Blobs of one run wherever they lie. What a place must answer: what this rank can tell of it, and the bytes."""

    def __init__(self, name: str, *, peers: Peers):
        self.name = name
        self.peers = peers
        self._held: dict[tuple[Lineage, int], list[Holding]] = {}

    @abstractmethod
    def _found(self) -> dict[str, BlobTable]:
        """Path and table of every finished blob that this rank, and no other one, is to report."""

    @abstractmethod
    def _is_reported_here(self, holding: Holding) -> bool:
        """Whether this rank reported it."""

    @abstractmethod
    def _source(self, holding: Holding, table: BlobTable) -> Source:
        """The bytes of a blob, for this rank to read."""

    @abstractmethod
    def _drop(self, holding: Holding) -> None:
        """Remove a blob that this rank reported."""

    @property
    def _own_node(self) -> int:
        return 0

    def list(self) -> list[CheckpointRecord]:
        found = self.peers.together(
            lambda: [
                Holding(self._own_node, path, table.lineage, table.step, table.rank, table.part, table.num_parts)
                for path, table in self._found().items()
            ]
        )
        self._held = {}
        for holding in (holding for node in found for holding in node):
            self._held.setdefault((holding.lineage, holding.step), []).append(holding)
        whole = [key for key, held in self._held.items() if _is_whole(held)]
        return [
            CheckpointRecord(step, f"{self.name} step {step} (start {lineage.generation})", lineage=lineage)
            for lineage, step in sorted(whole, reverse=True)
        ]

    def lineages(self) -> set[Lineage]:
        return {lineage for lineage, _ in self._held}

    def verify(self, record: CheckpointRecord) -> None:
        """Who reported a blob reads it; each part needs one that is as saved."""
        held = self._held[record.lineage, record.step]
        own = [holding for holding in held if self._is_reported_here(holding)]
        outcomes = self.peers.together(lambda: self._verdicts(own))
        verdicts = [verdict for node in outcomes for verdict in node]
        good = {part for part, damage in verdicts if damage is None}
        if len(good) < held[0].num_parts:
            damage = [text for part, text in verdicts if text is not None and part not in good]
            raise DamagedCheckpoint("; ".join(damage) or f"{record.location} is no longer whole")

    def _verdicts(self, own: Sequence[Holding]) -> Sequence[tuple[int, str | None]]:
        tables = self._tables_of(own)
        return [
            (holding.part, blob_damage(self._source(holding, table), table))
            for holding in own
            if (table := tables.get((holding.node, holding.path))) is not None
        ]

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        held = self._held[record.lineage, record.step]
        gathered = self.peers.together(lambda: self._tables_of(held))
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

    def _tables_of(self, held: Sequence[Holding]) -> dict[tuple[int, str], BlobTable]:
        """The tables of blobs that this rank reported, as far as they are still what they were."""
        own = [holding for holding in held if self._is_reported_here(holding)]
        now = self._found() if own else {}
        return {
            (holding.node, holding.path): table
            for holding in own
            if (table := now.get(holding.path)) is not None
            and (table.lineage, table.step) == (holding.lineage, holding.step)
        }

    def _distance(self, holding: Holding) -> tuple[bool, int, str]:
        return holding.node != self._own_node, holding.node, holding.path

    def _use_any(
        self,
        holdings: Sequence[Holding],
        tables: Mapping[tuple[int, str], BlobTable],
        use: Callable[[StoredFile], None],
    ) -> None:
        """Read from the nearest blob of a part, and from the next one when that is damaged or out of reach."""
        damage: list[str] = []
        for holding in holdings:
            table = tables[holding.node, holding.path]
            source = self._source(holding, table)
            if damage:
                logger.warning(f"{damage[-1]}; another copy is read: {source.name}")
            try:
                use(StoredFile(source, table.payload, start=HEAD_BYTES))
                return
            except (DamagedCheckpoint, StorageError) as error:
                damage.append(str(error))
            except OSError as error:
                damage.append(f"{source.name}: {error.strerror or error}")
        raise DamagedCheckpoint("; ".join(damage))

    def delete(self, record: CheckpointRecord) -> None:
        held = self._held.get((record.lineage, record.step), [])
        self.peers.together(lambda: [self._drop(holding) for holding in held if self._is_reported_here(holding)])


class NodeBlobTier(BlobTier):
    """Blobs of the run `job` below `root` on every node; `kind` is the agents' name for that folder."""

    def __init__(self, name: str, root: Path, *, kind: str, job: str, nodes: Nodes, peers: Peers):
        super().__init__(name, peers=peers)
        self._root = root
        self._kind = kind
        self._job = job
        self._nodes = nodes

    @property
    def _own_node(self) -> int:
        return self._nodes.own

    def _found(self) -> dict[str, BlobTable]:
        if not self._nodes.is_leader:
            return {}
        return {str(path.relative_to(self._root)): table for path, table in scan(self._root) if table.job == self._job}

    def _is_reported_here(self, holding: Holding) -> bool:
        return self._nodes.is_leader and holding.node == self._nodes.own

    def _source(self, holding: Holding, table: BlobTable) -> Source:
        if holding.node == self._nodes.own:
            return FileSource(self._root / holding.path)
        return AgentSource(self._nodes.agents[holding.node], self._kind, holding.path)

    def _drop(self, holding: Holding) -> None:
        (self._root / holding.path).unlink(missing_ok=True)


class HyperPodTier(BlobTier):
    """Blobs in HyperPod's own memory tier, which rank 0 asks for all."""

    def __init__(self, memory: HyperPodMemory, *, peers: Peers):
        super().__init__(memory.name, peers=peers)
        self._memory = memory

    def _found(self) -> dict[str, BlobTable]:
        if not self.peers.is_main:
            return {}
        tables = self._memory.tables()
        return {f"{table.lineage.generation}-{table.lineage.id}/{table.step}/{table.rank}": table for table in tables}

    def _is_reported_here(self, holding: Holding) -> bool:
        return self.peers.is_main

    def _source(self, holding: Holding, table: BlobTable) -> Source:
        return self._memory.source(table)

    def _drop(self, holding: Holding) -> None:
        """The daemon keeps the newest steps of a start and drops the others itself."""


def _is_whole(held: Sequence[Holding]) -> bool:
    return {holding.part for holding in held} >= set(range(held[0].num_parts))


def _decode(content: memoryview, item: Item) -> torch.Tensor:
    dtype = dtype_of(item)
    if not content.nbytes:
        return torch.empty(item.sizes, dtype=dtype)
    # Torch knows no read-only tensors, and what came from a client's `bytes` is read-only.
    return torch.frombuffer(bytearray(content) if content.readonly else content, dtype=dtype).view(item.sizes)


def _layout(
    items_by_part: Mapping[int, Sequence[Item]],
) -> tuple[Metadata, dict[MetadataIndex, Place], dict[MetadataIndex, Item]]:
    """All boxes of all parts as torch plans with them; a box that several parts hold is taken from the first."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, Place] = {}
    shapes: dict[MetadataIndex, Item] = {}
    for part, items in sorted(items_by_part.items()):
        for item in items:
            properties = TensorProperties(dtype=dtype_of(item))
            entry = tensors.setdefault(item.name, TensorStorageMetadata(properties, torch.Size(item.shape), []))
            index = MetadataIndex(item.name, torch.Size(item.offsets))
            if index in places:
                continue
            entry.chunks.append(ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)))
            places[index] = Place(str(part), item.begin, item.size_bytes)
            shapes[index] = item
    return Metadata(dict(tensors)), places, shapes
