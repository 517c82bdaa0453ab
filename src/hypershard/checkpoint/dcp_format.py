"""The format of torch.distributed.checkpoint: written so that any of its readers opens it, read block by block checked.

Planning is torch's own (`DefaultSavePlanner`, `DefaultLoadPlanner`); only the bytes are moved here. Torch's writer
would fsync through a path and lose the errors of helper threads, and its reader checks no content.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import DamagedCheckpoint
from .sums import FileSum, RunningSum, Source, read_verified


class ByteSink(Protocol):
    def write(self, data: Any, /) -> Any: ...


@dataclass(frozen=True)
class Place:
    """Where a stored box lies: in which file, from which byte on, how long."""

    file: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """What one rank wrote: its file's name and sum (None: it had nothing to write), and the places of its boxes."""

    file: str
    sum: FileSum | None
    places: dict[MetadataIndex, Place]


def plan_globally(local_plans: Sequence[SavePlan]) -> tuple[list[SavePlan], Metadata]:
    """What each rank writes, every box once, and the layout of the whole."""
    return DefaultSavePlanner().create_global_plan(list(local_plans))


def part_name(rank: int) -> str:
    return f"__{rank}_0.distcp"  # torch's own naming


class _Summing(io.RawIOBase):
    """Passes bytes on to a sink, sums them up and knows how far it is."""

    def __init__(self, sink: ByteSink):
        self._sink = sink
        self.running = RunningSum()
        self.refusal: Exception | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._sink.write(data)
        except Exception as error:  # whatever it is, `write_part` raises it again
            self.refusal = error
            raise
        self.running.add(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.running.size_bytes


def write_part(plan: SavePlan, parts: Mapping[MetadataIndex, torch.Tensor], sink: ByteSink, *, file: str) -> Part:
    """Write the boxes of `plan` one after the other, each as torch.save makes it."""
    stream, places = _Summing(sink), {}
    for item in plan.items:
        tensor = parts[item.index].detach().cpu()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes whole storages
        begin = stream.tell()
        try:
            torch.save(tensor, cast(IO[bytes], stream))
        except Exception:  # whatever torch's zip writer makes of the sink's refusal, which it hides
            if stream.refusal is not None:
                raise stream.refusal from None
            raise
        places[item.index] = Place(file, begin, stream.tell() - begin)
    return Part(file, stream.running.result(), places)


def layout_bytes(metadata: Metadata, parts: Sequence[Part]) -> bytes:
    """The content of `.metadata`: where every box lies."""
    metadata.storage_data = {
        index: dcp_filesystem._StorageInfo(place.file, place.offset, place.size_bytes)
        for part in parts
        for index, place in part.places.items()
    }
    metadata.storage_meta = StorageMeta()
    metadata.version = dcp_filesystem.CURRENT_DCP_VERSION
    return pickle.dumps(metadata)


def places_of(metadata: Metadata) -> dict[MetadataIndex, Place]:
    return {index: Place(info.relative_path, info.offset, info.length) for index, info in metadata.storage_data.items()}


@dataclass(frozen=True)
class StoredFile:
    """A file to read boxes from: its bytes, their sums, and where in the source the summed bytes begin."""

    source: Source
    sum: FileSum
    start: int = 0


Decode = Callable[[MetadataIndex, memoryview], torch.Tensor]


def decode_saved(_index: MetadataIndex, content: memoryview) -> torch.Tensor:
    """The tensor that torch.save wrote; nothing but tensors is ever made from its pickle."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def fill(
    tensors: Mapping[str, torch.Tensor],
    metadata: Metadata,
    places: Mapping[MetadataIndex, Place],
    read_file: Callable[[str, Callable[[StoredFile], None]], None],
    decode: Decode,
) -> None:
    """Fill `tensors` (plain, or DTensors of any sharding) in place; this rank reads what it holds, alone.

    `read_file(name, use)` calls `use` with the stored file of that name, again with another copy of it if one fails.
    Raises DamagedCheckpoint; then the tensors hold a mixture, to be filled again or thrown away.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
        # The global step of a load plan only gathers plans; there is nothing to coordinate.
        plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
        by_file: dict[str, dict[Place, list[ReadItem]]] = {}
        for item in plan.items:
            place = places[item.storage_index]
            by_file.setdefault(place.file, {}).setdefault(place, []).append(item)
        for name, wanted in sorted(by_file.items()):
            ordered = sorted(wanted, key=lambda place: place.offset)

            def use(stored: StoredFile, ordered: list[Place] = ordered, wanted: Any = wanted) -> None:
                requests = [(place.offset, place.size_bytes) for place in ordered]
                contents = read_verified(stored.source, stored.sum, requests, start=stored.start)
                for place, content in zip(ordered, contents, strict=True):
                    for item in wanted[place]:
                        _put(planner, item, decode(item.storage_index, content), stored.source.name)

            read_file(name, use)


def _put(planner: DefaultLoadPlanner, item: ReadItem, box: torch.Tensor, origin: str) -> None:
    for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        box = box.narrow(dimension, offset, length)
    target = planner.resolve_tensor(item).detach()
    if target.shape != box.shape:
        found, expected = tuple(box.shape), tuple(target.shape)
        raise DamagedCheckpoint(f"{origin}: {item.storage_index.fqn}: found {found}, expected {expected}")
    target.copy_(box)
    planner.commit_tensor(item, target)
