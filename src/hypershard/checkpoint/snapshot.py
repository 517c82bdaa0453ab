"""What one rank contributes to a checkpoint: its part of every tensor, live or copied to host memory."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from ..errors import StorageError
from ..log import logger
from ..units import format_bytes

# Below this, pinned memory comes from torch's own cache: it rounds sizes up to a power of two, which would
# waste up to half of a large buffer, but small ones would share pages, which can be pinned only once.
_OWN_PAGES_BYTES = 2**20


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


def take_snapshot(tensors: Mapping[str, torch.Tensor]) -> Snapshot:
    """The parts of `tensors` (plain: the same on all ranks; DTensors: this rank's shard) as they are, not copied."""
    planner = DefaultSavePlanner()
    with torch.no_grad():
        planner.set_up_planner(dict(tensors), is_coordinator=False)
        plan = planner.create_local_plan()
        parts = {item.index: planner.lookup_object(item.index).detach() for item in plan.items}
    return Snapshot(plan, parts)


class SnapshotPlanner(DefaultSavePlanner):
    """Saves a snapshot instead of a state dict."""

    def __init__(self, snapshot: Snapshot):
        super().__init__()
        self._snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        self.plan = self._snapshot.plan
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._snapshot.parts[write_item.index]


class HostBuffers:
    """Host memory that snapshots are copied to, allocated once and used again for every save.

    Pinned when the tensors are on a GPU, where that makes the copy several times faster.
    """

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    def reserve(self, snapshot: Snapshot) -> None:
        """Allocate and touch the memory now, so that the first save neither runs out of it nor waits for it.

        Raises StorageError when the host has less to give than this rank's copy needs: Linux would promise the memory
        and kill the process when it is touched.
        """
        missing = {index: part for index, part in snapshot.parts.items() if not self._fits(index, part)}
        needed_bytes, free_bytes = sum(part.nbytes for part in missing.values()), available_memory_bytes()
        if needed_bytes > free_bytes:
            raise StorageError(
                f"--async_checkpointing=1 keeps a copy of {format_bytes(needed_bytes)} in host memory, found "
                f"{format_bytes(free_bytes)} available; set --async_checkpointing=0, which writes without a copy",
                shared_by_all_ranks=False,
            )
        for index, part in missing.items():
            self._buffers[index] = self._allocate(part)

    def _fits(self, index: MetadataIndex, part: torch.Tensor) -> bool:
        buffer = self._buffers.get(index)
        return buffer is not None and buffer.shape == part.shape and buffer.dtype == part.dtype

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its values copied. On return the originals may change; the next copy reuses the memory."""
        self.reserve(snapshot)
        devices = set()
        for index, part in snapshot.parts.items():
            self._buffers[index].copy_(part, non_blocking=part.is_cuda)
            if part.is_cuda:
                devices.add(part.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return dataclasses.replace(snapshot, parts={index: self._buffers[index] for index in snapshot.parts})

    def _allocate(self, part: torch.Tensor) -> torch.Tensor:
        if part.is_cuda and part.nbytes < _OWN_PAGES_BYTES:
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        buffer = torch.empty(part.shape, dtype=part.dtype).fill_(0)  # zeros() would leave the pages untouched
        if part.is_cuda:
            self._pin(buffer)
        return buffer

    def _pin(self, buffer: torch.Tensor) -> None:
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        if error:
            size = format_bytes(buffer.nbytes)
            logger.warning(f"async_checkpointing: {size} could not be pinned (CUDA error {error}); copies take longer")
            return
        # Runs before the buffers themselves are freed, and not at exit, when CUDA may be gone already.
        weakref.finalize(self, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False


def available_memory_bytes() -> int:
    """Host memory that can be had without swapping, as Linux estimates it (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # the file counts KiB
    return sys.maxsize
