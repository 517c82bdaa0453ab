"""What one rank contributes to a checkpoint: its part of every tensor, live or copied to host memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from .blob import Item, layout_items


@dataclass(frozen=True)
class Snapshot:
    """This rank's parts and their places in the whole tensors, as torch.distributed.checkpoint plans them.

    Planned from the tensors themselves, so host copies keep the places that the (CUDA) mesh gave them.
    """

    plan: SavePlan
    parts: dict[MetadataIndex, torch.Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def items(self) -> list[Item]:
        """The parts as a blob lists them, in the plan's order."""
        return layout_items([(*_box(item), self.parts[item.index].nbytes) for item in self.plan.items])


def _box(item: WriteItem) -> tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    data = item.tensor_data
    assert data is not None, "a checkpoint's state holds tensors only"
    dtype = str(data.properties.dtype).removeprefix("torch.")
    return item.index.fqn, dtype, tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes)


def boxes_digest(snapshot: Snapshot) -> str:
    """Equal exactly for ranks that hold the same boxes of the same tensors, that is, for replicas."""
    return hashlib.blake2b(repr([_box(item) for item in snapshot.plan.items]).encode(), digest_size=16).hexdigest()


def take_snapshot(tensors: Mapping[str, torch.Tensor]) -> Snapshot:
    """The parts of `tensors` (plain: the same on all ranks; DTensors: this rank's shard) as they are, not copied."""
    planner = DefaultSavePlanner()
    with torch.no_grad():
        planner.set_up_planner(dict(tensors), is_coordinator=False)
        plan = planner.create_local_plan()
        parts = {item.index: planner.lookup_object(item.index).detach() for item in plan.items}
    return Snapshot(plan, parts)


def available_memory_bytes() -> int:
    """Host memory that can be had without swapping, as Linux estimates it (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts KiB
    return sys.maxsize
