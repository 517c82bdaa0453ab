"""What one rank contributes to a checkpoint: its part of every tensor, live or copied to host memory."""

from __future__ import annotations

import hashlib
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from ..errors import DamagedCheckpoint
from .blob import HEAD_BYTES, Item, layout_items


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


def dtype_of(item: Item) -> torch.dtype:
    """Raises DamagedCheckpoint when torch knows no such dtype."""
    dtype = getattr(torch, item.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise DamagedCheckpoint(f"{item.name} has dtype {item.dtype!r}")
    return dtype


def view_of(memory: mmap.mmap, item: Item) -> torch.Tensor:
    """An item of the blob in `memory` as a tensor whose storage is just its own range."""
    dtype = dtype_of(item)
    if not item.size_bytes:
        return torch.empty(item.sizes, dtype=dtype)
    count = item.size_bytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=HEAD_BYTES + item.begin).view(item.sizes)


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


class Snapshots:
    """Takes snapshots of the same tensors again and again: planned once, since only their values change."""

    def __init__(self) -> None:
        self._layout: list[Any] | None = None
        self._plan: SavePlan | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """As `take_snapshot`."""
        local = {name: _local(tensor) for name, tensor in tensors.items()}
        layout = [_layout_of(name, tensor, local[name]) for name, tensor in tensors.items()]
        if self._plan is None or layout != self._layout:
            snapshot = take_snapshot(tensors)
            # A tensor without a part here (an empty shard) or with several is planned anew each time.
            simple = [item.index.fqn for item in snapshot.plan.items] == list(tensors)
            self._layout, self._plan = layout, snapshot.plan if simple else None
            return snapshot
        return Snapshot(self._plan, {item.index: local[item.index.fqn] for item in self._plan.items})


def _layout_of(name: str, tensor: torch.Tensor, local: torch.Tensor) -> tuple[Any, ...]:
    """All that the plan of a tensor depends on."""
    where = (tensor.shape, tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else ()
    return name, local.shape, local.dtype, *where


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def available_memory_bytes() -> int:
    """Host memory that can be had without swapping, as Linux estimates it (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts KiB
    return sys.maxsize
