"""A durable checkpoint out of the blobs that lie on this node: what was saved to memory only, brought to safety."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..errors import CheckpointError, DamagedCheckpoint
from .blob import Item
from .dcp_format import ByteSink, Part, part_name, plan_globally, write_part
from .durable import commit_folder
from .manifest import Manifest, StoredCheckpoint, stored_checkpoints
from .node_blobs import Blob, BlobSet
from .snapshot import dtype_of, view_of
from .stores import Store
from .transfer import Progress, files_at_once, in_parallel, new_folder


def assemble(blobs: BlobSet, target: Store, progress: Progress) -> StoredCheckpoint:
    """Write the checkpoint that `blobs`, which must be whole, make together to `target`, one file per part.

    Each blob is verified first and looked at again afterwards, because a running job may write it anew at any time;
    so `progress` is told of twice the size of its parts.
    Raises DamagedCheckpoint, CheckpointError (written anew meanwhile) and StorageError; then nothing stays there.
    """
    held = [blobs.parts[number] for number in range(blobs.num_parts)]
    plans, metadata = plan_globally([_plan(blob.table.items) for blob in held])
    written: dict[int, Part] = {}
    with new_folder(target, blobs.step) as folder:

        def write(number: int) -> None:
            blob, plan, file = held[number], plans[number], part_name(number)
            if not plan.items:
                written[number] = Part(file, None, {})
                return
            _verify(blob, progress)
            with _mapped(blob.path) as memory, target.stream(folder, file, seconds=None) as sink:
                tensors = {_index(item): view_of(memory, item) for item in blob.table.items}
                written[number] = write_part(plan, tensors, _Told(sink, progress), file=file)
                if not blob.is_still_there():
                    raise _gone(blob)

        tasks = [partial(write, number) for number in range(blobs.num_parts)]
        in_parallel(tasks, num_threads=files_at_once(target), progress=progress)
        table = held[0].table
        parts = [written[number] for number in range(blobs.num_parts)]
        facts, torch_version = {**table.facts, "step": table.step}, str(torch.__version__)
        about = Manifest(table.step, table.lineage, blobs.saved_at, table.world_size, torch_version, {})
        commit_folder(target, folder, parts, metadata=metadata, facts=facts, about=about)
    return next(one for one in stored_checkpoints(target) if one.folder == folder)


@dataclass(frozen=True)
class _Told:
    """A sink whose writes are reported."""

    sink: ByteSink
    progress: Progress

    def write(self, data: Any, /) -> None:
        self.progress.advance(memoryview(data).nbytes)
        self.sink.write(data)


def _verify(blob: Blob, progress: Progress) -> None:
    if damage := blob.damage(progress.following(blob.source)):
        raise DamagedCheckpoint(damage) if blob.is_still_there() else _gone(blob)


def _gone(blob: Blob) -> CheckpointError:
    return CheckpointError(f"{blob.path} was written anew while it was read: the run goes on; try again")


def _index(item: Item) -> MetadataIndex:
    return MetadataIndex(item.name, torch.Size(item.offsets))


def _plan(items: tuple[Item, ...]) -> SavePlan:
    """What the rank that wrote these items planned to save."""
    writes = [
        WriteItem(
            _index(item),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes)),
                TensorProperties(dtype=dtype_of(item)),
                torch.Size(item.shape),
            ),
        )
        for item in items
    ]
    # What torch notes of a flat state dict: each name is its own path.
    return SavePlan(writes, planner_data={item.name: (item.name,) for item in items})


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, read when touched. Private and writable, because torch warns of memory it may not write."""
    with open(path, "rb") as file:
        # Not closed at the end: the tensors that look into it go a moment later and take it with them.
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
