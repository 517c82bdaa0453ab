"""What a run could go on from, found by looking into every tier from outside while no process of it runs.

All bytes are compared with their checksums here; nothing is taken from what the run said.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.faults.place import Site
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hypershard.checkpoint.blob import HEAD_BYTES, blob_damage
from hypershard.checkpoint.lineage import UNREADABLE, Lineage
from hypershard.checkpoint.manifest import Place, StoredCheckpoint
from hypershard.checkpoint.metadata import read_metadata, read_tensors
from hypershard.checkpoint.node_blobs import Blob, blobs_below
from hypershard.checkpoint.stores import DiskStore, S3Store
from hypershard.errors import CheckpointError
from hypershard.s3 import S3Uri

MEMORY, LOCAL, DISK, S3 = "memory", "local", "disk", "s3"
TIERS = (MEMORY, LOCAL, DISK, S3)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that passes for whole. `damaged` are the files because of which it is none, as logs name them."""

    tier: str
    lineage: Lineage
    step: int
    attempt: int
    damaged: tuple[str, ...]
    blobs: tuple[Blob, ...] = ()
    stored: StoredCheckpoint | None = None

    @property
    def order(self) -> tuple[Lineage, int, int, int]:
        """The greatest is what a resume looks at first."""
        return self.lineage, self.step, -TIERS.index(self.tier), self.attempt


@dataclass(frozen=True)
class Survivors:
    """All candidates, best first, and files of memory and local disks of which not even the table is whole."""

    candidates: tuple[Candidate, ...]
    broken_tables: tuple[str, ...]

    def best(self, *, without: Iterable[str] = ()) -> Candidate | None:
        left = (one for one in self.candidates if not one.damaged and one.tier not in without)
        return next(left, None)

    def newest_step(self, *, without: Iterable[str] = ()) -> int:
        best = self.best(without=without)
        return 0 if best is None else best.step

    def met_before(self, step: int, tier: str) -> list[Candidate]:
        """Damaged candidates that a resume meets before it takes `step` from `tier`."""
        taken = next(one for one in self.candidates if one.step == step and one.tier == tier and not one.damaged)
        return [one for one in self.candidates if one.damaged and one.order > taken.order]


@dataclass(frozen=True)
class RunPlaces:
    """Where one run keeps its checkpoints."""

    run_dir: Path
    checkpoint_dir: Path
    uri: S3Uri

    def stores(self, site: Site) -> tuple[DiskStore, S3Store]:
        return DiskStore(self.checkpoint_dir), S3Store(self.uri, site.bucket)

    def run_id(self, site: Site) -> str | None:
        for store in self.stores(site):
            with contextlib.suppress(FileNotFoundError):
                return store.read("", "run-id").decode().strip()
        return None


def blob_roots(site: Site, places: RunPlaces, *, num_nodes: int | None = None) -> list[tuple[str, int, Path]]:
    """Tier, node and folder of all memory and local disks of the first nodes that hold something of the run."""
    run = places.run_id(site)
    if run is None:
        return []
    found = []
    for node in site.nodes[:num_nodes]:
        for tier, folder in ((MEMORY, node.shm), (LOCAL, site.disk(node.number))):
            if (root := folder / f"hypershard-{os.getuid()}" / run).is_dir():
                found.append((tier, node.number, root))
    return found


def look(site: Site, places: RunPlaces, *, num_nodes: int | None = None) -> Survivors:
    """What a job on the first `num_nodes` nodes (None: all) can find."""
    candidates, broken = _in_blobs(site, places, num_nodes)
    for store in places.stores(site):
        candidates += [_stored(store.name, one) for one in Place(store).finished()]
    return Survivors(tuple(sorted(candidates, key=lambda one: one.order, reverse=True)), tuple(broken))


def _in_blobs(site: Site, places: RunPlaces, num_nodes: int | None) -> tuple[list[Candidate], list[str]]:
    held: defaultdict[tuple[str, Lineage, int], list[Blob]] = defaultdict(list)
    broken: list[str] = []
    run = places.run_id(site) or ""
    for tier, _, root in blob_roots(site, places, num_nodes=num_nodes):
        found = blobs_below(root, tier=tier, run=run)
        broken += [_short(text) for text in found.damage]
        for one in found.sets:
            held[tier, one.lineage, one.step] += one.blobs
    whole = []
    for (tier, lineage, step), blobs in held.items():
        num_parts = blobs[0].table.num_parts
        parts = {part: [blob for blob in blobs if blob.table.part == part] for part in range(num_parts)}
        if not all(parts.values()):
            continue
        good = [_good(copies) for copies in parts.values()]
        bad = [_short(str(blob.path)) for part, copies in parts.items() for blob in copies if good[part] is None]
        whole.append(Candidate(tier, lineage, step, 1, tuple(bad), tuple(blob for blob in good if blob is not None)))
    return whole, broken


def _good(copies: Sequence[Blob]) -> Blob | None:
    return next((blob for blob in copies if blob_damage(blob.source, blob.table) is None), None)


def _short(text: str) -> str:
    """The end of a blob's path, which is the same seen from its node, from another one and from here."""
    at = max(text.find("own/rank-"), text.find("copies/rank-"))
    return text[at:].split(":", maxsplit=1)[0].split(maxsplit=1)[0]


def _stored(tier: str, stored: StoredCheckpoint) -> Candidate:
    try:
        manifest = stored.manifest()
    except CheckpointError:
        return Candidate(tier, UNREADABLE, stored.step, stored.attempt, (f"{stored.folder}/MANIFEST.json",))
    bad = [f"{stored.folder}/{name}" for name in manifest.files if stored.damage(manifest, name)]
    return Candidate(tier, manifest.lineage, stored.step, stored.attempt, tuple(bad), (), stored)


# --- what the tensors are ------------------------------------------------------------------------------------


def digest(candidate: Candidate) -> str:
    """SHA-256 over names, shapes, types and bytes of all tensors of a checkpoint that is whole."""
    tensors = _of_blobs(candidate.blobs) if candidate.stored is None else _of_files(candidate.stored)
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _of_files(stored: StoredCheckpoint) -> dict[str, torch.Tensor]:
    manifest = stored.manifest()
    metadata = read_metadata(stored, manifest)
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    read_tensors(stored, manifest, metadata, tensors)
    return tensors


def _of_blobs(blobs: Iterable[Blob]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for blob in blobs:
        content = bytearray(blob.path.read_bytes())
        for item in blob.table.items:
            dtype = getattr(torch, item.dtype)
            whole = tensors.setdefault(item.name, torch.zeros(item.shape, dtype=dtype))
            count = item.size_bytes // dtype.itemsize
            if not count:
                continue
            box = torch.frombuffer(content, dtype=dtype, count=count, offset=HEAD_BYTES + item.begin)
            places = tuple(slice(at, at + size) for at, size in zip(item.offsets, item.sizes, strict=True))
            whole[places] = box.view(item.sizes)
    return tensors
