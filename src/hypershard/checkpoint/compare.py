"""What differs between two checkpoints: facts, tensors, values; read with bounded memory, whatever their sizes.

Boxes in blocks of the same sums are equal unread. Of the others, one box of each side is in memory at a time (a
rank's shard of one tensor), and some blocks of each side's files.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ..errors import DamagedCheckpoint
from .dcp_format import Place, decode_saved, places_of
from .manifest import Manifest, StoredCheckpoint
from .metadata import read_metadata
from .sums import BLOCK_BYTES, Source, num_blocks, read_verified
from .transfer import Progress

_KEPT_BLOCKS = 16  # of each side: 512 MiB
_SLICE_ELEMENTS = 2**21  # compared at once, in float64


@dataclass
class ValueDifference:
    """Over the elements compared: how many differ, and by how much.

    NaN equals NaN. `max_relative` is the largest |a - b| / max(|a|, |b|) of an element; NaN or infinity on one side
    alone counts as infinite.
    """

    num_elements: int
    num_compared: int = 0
    num_differing: int = 0
    max_absolute: float = 0.0
    max_relative: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # sums of those of a, b, a - b

    @property
    def relative(self) -> float:
        """Of the tensor as a whole, where an element near zero that changed its sign counts for little.

        The length of a - b over that of the longer of a and b.
        """
        longest = max(self.squares[:2])
        return math.sqrt(self.squares[2] / longest) if longest else (math.inf if self.squares[2] else 0.0)


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both have. `layouts` are shape and dtype of each; `values` None: not compared."""

    name: str
    layouts: tuple[str, str]
    values: ValueDifference | None

    @property
    def same_layout(self) -> bool:
        return self.layouts[0] == self.layouts[1]

    @property
    def is_equal(self) -> bool:
        return self.same_layout and (self.values is None or not self.values.num_differing)


@dataclass(frozen=True)
class Comparison:
    """`facts` maps the dotted name of a fact that differs to its two values as JSON (None: not there)."""

    facts: dict[str, tuple[str | None, str | None]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    tensors: tuple[TensorDifference, ...]
    num_equal_unread: int

    @property
    def is_equal(self) -> bool:
        return not self.facts and not any(self.only) and all(tensor.is_equal for tensor in self.tensors)


@dataclass
class Side:
    """One of the two checkpoints, opened."""

    stored: StoredCheckpoint
    manifest: Manifest
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.metadata: Metadata = read_metadata(self.stored, self.manifest)
        self.places = places_of(self.metadata)
        stored = self.metadata.state_dict_metadata.items()
        self.tensors = {name: entry for name, entry in stored if isinstance(entry, TensorStorageMetadata)}
        self._blocks: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def boxes(self, name: str) -> list[Box]:
        return [
            Box(MetadataIndex(name, chunk.offsets), tuple(chunk.offsets), tuple(chunk.sizes))
            for chunk in self.tensors[name].chunks
            if math.prod(chunk.sizes)
        ]

    def read(self, box: Box) -> torch.Tensor:
        """The values of a box, verified. Raises DamagedCheckpoint."""
        place = self.places[box.index]
        source = _KeptBlocks(self.stored.store.source(self.stored.folder, place.file), self._blocks, self.progress)
        (content,) = read_verified(source, self.manifest.files[place.file], [(place.offset, place.size_bytes)])
        tensor = decode_saved(box.index, content)
        if tuple(tensor.shape) != box.sizes:
            raise DamagedCheckpoint(f"{source.name}: {box.index.fqn} holds {tuple(tensor.shape)}, not {box.sizes}")
        return tensor


@dataclass(frozen=True)
class Box:
    index: MetadataIndex
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _KeptBlocks:
    """A source that keeps the blocks read last: small tensors share them."""

    source: Source
    kept: OrderedDict[tuple[str, int], Any]
    progress: Progress
    parallel_reads: int = 1  # the keeping is not made for several threads

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, offset: int, size_bytes: int) -> Any:
        key = (self.source.name, offset)
        if key not in self.kept:
            content = self.source.read(offset, size_bytes)
            self.progress.advance(memoryview(content).nbytes)
            self.kept[key] = content
            while len(self.kept) > _KEPT_BLOCKS:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


def compare(one: Side, other: Side, *, pattern: str | None, with_values: bool) -> Comparison:
    """Compare two checkpoints. With a `pattern` (a glob) just the tensors of such names, and no facts.

    Raises DamagedCheckpoint when what is read is not as saved.
    """
    names = [{name for name in side.tensors if pattern is None or fnmatchcase(name, pattern)} for side in (one, other)]
    both = sorted(names[0] & names[1])
    unread = {name for name in both if _same_bytes(one, other, name)}
    values = {
        name: ValueDifference(math.prod(one.tensors[name].size))
        for name in both
        if with_values and name not in unread and one.tensors[name].size == other.tensors[name].size
    }
    _compare_values(one, other, values)
    facts = {} if pattern is not None else differing_facts(one, other)
    tensors = tuple(
        TensorDifference(name, (_layout(one.tensors[name]), _layout(other.tensors[name])), values.get(name))
        for name in both
    )
    only = (tuple(sorted(names[0] - names[1])), tuple(sorted(names[1] - names[0])))
    return Comparison(facts, only, tensors, len(unread))


def _layout(entry: TensorStorageMetadata) -> str:
    return f"{tuple(entry.size)} {str(entry.properties.dtype).removeprefix('torch.')}"


def differing_facts(one: Side, other: Side) -> dict[str, tuple[str | None, str | None]]:
    flat = [dict(_flat("", side.stored.facts(side.manifest))) for side in (one, other)]
    names = sorted(flat[0].keys() | flat[1].keys())
    pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, json.dumps(value)


def _same_bytes(one: Side, other: Side, name: str) -> bool:
    """Whether all boxes of a tensor lie in the same ranges of blocks with the same sums.

    A block that differs has the same CRC32C once in four billion times.
    """
    if _layout(one.tensors[name]) != _layout(other.tensors[name]):
        return False
    return _fingerprint(one, name) == _fingerprint(other, name)


def _fingerprint(side: Side, name: str) -> set[tuple[Any, ...]]:
    boxes: set[tuple[Any, ...]] = set()
    for box in side.boxes(name):
        place: Place = side.places[box.index]
        file = side.manifest.files[place.file]
        first, end = place.offset // BLOCK_BYTES, num_blocks(place.offset + place.size_bytes)
        end_bytes = min(end * BLOCK_BYTES, file.size_bytes)
        boxes.add((box.offsets, box.sizes, place.offset, place.size_bytes, end_bytes, file.blocks[first:end]))
    return boxes


def _compare_values(one: Side, other: Side, values: Mapping[str, ValueDifference]) -> None:
    """Read what is in `values` box by box, in the order of the files of the side with fewer of them."""
    outer, inner = sorted((one, other), key=lambda side: len(side.manifest.files))
    boxes = [box for name in values for box in outer.boxes(name)]
    boxes.sort(key=lambda box: (outer.places[box.index].file, outer.places[box.index].offset))
    for box in boxes:
        name = box.index.fqn
        mine: torch.Tensor | None = None
        for its in inner.boxes(name):
            common = _common(box, its)
            if common is None:
                continue
            mine = outer.read(box) if mine is None else mine
            _add(values[name], _cut(mine, box, common), _cut(inner.read(its), its, common))
    for name, value in values.items():
        if value.num_compared != value.num_elements:
            raise DamagedCheckpoint(
                f"{name}: found {value.num_compared} of {value.num_elements} elements in both {one.stored.location} "
                f"and {other.stored.location}"
            )


def _common(one: Box, other: Box) -> Box | None:
    starts = tuple(map(max, one.offsets, other.offsets))
    ends = [min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Box(one.index, starts, sizes) if all(size > 0 for size in sizes) else None


def _cut(tensor: torch.Tensor, box: Box, common: Box) -> torch.Tensor:
    for dimension, (whole, begin, size) in enumerate(zip(box.offsets, common.offsets, common.sizes, strict=True)):
        tensor = tensor.narrow(dimension, begin - whole, size)
    return tensor.reshape(-1)


def _add(total: ValueDifference, one: torch.Tensor, other: torch.Tensor) -> None:
    total.num_compared += one.numel()
    for begin in range(0, one.numel(), _SLICE_ELEMENTS):
        a, b = (tensor[begin : begin + _SLICE_ELEMENTS] for tensor in (one, other))
        _add_slice(total, a, b)


def _add_slice(total: ValueDifference, a: torch.Tensor, b: torch.Tensor) -> None:
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    # Whole numbers are compared as such: float64 does not hold all of 64 bits.
    is_whole = not (a.is_floating_point() or b.is_floating_point())
    differs = a != b if is_whole else (wide_a != wide_b) & ~(wide_a.isnan() & wide_b.isnan())
    for side, wide in enumerate((wide_a, wide_b)):
        total.squares[side] += float(wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum())
    num_differing = int(differs.sum())
    if not num_differing:
        return
    total.num_differing += num_differing
    wide_a, wide_b = wide_a[differs], wide_b[differs]
    absolute = (wide_a - wide_b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    relative = absolute / torch.maximum(wide_a.abs(), wide_b.abs())
    total.squares[2] += float(absolute.square().sum())
    total.max_absolute = max(total.max_absolute, float(absolute.max()))
    total.max_relative = max(total.max_relative, float(relative.nan_to_num(nan=math.inf, posinf=math.inf).max()))
