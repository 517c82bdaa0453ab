"""Weights from model folders of Hugging Face's layout: each rank reads the bytes it holds, and no others."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from ..distributed.mesh import local_part
from ..errors import CheckpointError
from ..log import logger
from ..remote_files import Patience, Ranges, open_ranges
from .hf_folder import ModelFolder
from .hf_names import Piece, canonical_names, pieces_in, vision_names

_HEAD = "lm_head.weight"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES_SHOWN = 3
# One request: its latency (some tens of milliseconds) is small beside it, and as much again is read at once elsewhere.
_BLOCK_BYTES = 16 * 2**20
_READS_AT_ONCE = 8
# What may be read in vain to save a request, of a box whose bytes do not lie one after the other.
_IDLE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Part:
    """A part of the tensor `name` of `shape` that is to be filled: `local`, whose first element is at `starts`."""

    name: str
    shape: tuple[int, ...]
    local: torch.Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """Bytes `begin` to `end` of a file, and what they fill: of the elements there, those at `strides`."""

    file: str
    begin: int
    end: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    target: torch.Tensor


class Packed(Protocol):
    """A weight that is held otherwise than it lies in files: it takes its values box by box."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def boxes(self) -> Iterator[tuple[slice, ...]]:
        """Boxes of the weight that make up what this rank holds of it."""

    def empty(self, box: tuple[slice, ...]) -> torch.Tensor:
        """Where the values of a box are to be put."""

    def fill(self, box: tuple[slice, ...], values: torch.Tensor) -> None:
        """Take them."""


def load_hf_weights(
    folder: ModelFolder, weights: Mapping[str, torch.Tensor | Packed], *, patience: Patience | None = None
) -> None:
    """Fill `weights` (our names; plain, DTensors of any sharding, or packed) from a model folder, in place.

    Each rank reads only what it holds, some 150 MB at a time; values are cast to the tensors' dtypes. Of packed weights
    no more than the boxes that are being read are held besides. Raises CheckpointError as `HfWeights` does.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    being_read: deque[Callable[[], None]] = deque()  # what to do with each part when it is filled

    def parts() -> Iterator[Part]:
        for name, weight in weights.items():
            if isinstance(weight, torch.Tensor):
                being_read.append(lambda: None)
                yield Part(name, shapes[name], *local_part(weight))
                continue
            for box in weight.boxes():
                values = weight.empty(box)
                being_read.append(functools.partial(weight.fill, box, values))
                yield Part(name, shapes[name], values, tuple(span.start for span in box))

    for _ in HfWeights(folder, shapes).fill(parts(), patience=patience):
        being_read.popleft()()


class HfWeights:
    """The tensors of a model, by our names, as they lie in a model folder.

    `shapes` are those of the whole model. A stored `lm_head.weight` is ignored where ours is tied; of a model with
    vision the text model is read, and the log says so. Raises CheckpointError naming what is missing, extra, mis-shaped
    or quantised.
    """

    def __init__(self, folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]]):
        self._folder = folder
        self._sources = canonical_names(folder.tensors, shapes)
        self._check_same_model(shapes)
        if unused := vision_names(folder.tensors):
            logger.info(f"{folder.location} sees: its text model is taken, {len(unused)} vision tensors are not used")

    def _check_same_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        wrong, known = [], {_HEAD}
        for piece in (piece for name, shape in shapes.items() for piece in pieces_in(name, shape, self._sources)):
            known.add(piece.name)
            if piece.name not in self._sources:
                hint = " (give --tie_word_embeddings 1 if the model ties it)" if piece.name == _HEAD else ""
                wrong.append(f"{piece.name}: found nothing, expected {piece.stored_shape}{hint}")
                continue
            stored = self._folder.tensors[self._sources[piece.name]]
            if stored.shape != piece.stored_shape:
                wrong.append(f"{piece.name}: found {stored.shape}, expected {piece.stored_shape}")
            elif stored.dtype not in _FLOATS:
                wrong.append(f"{piece.name}: found {stored.dtype} (quantised), expected one of {sorted(_FLOATS)}")
        wrong += [f"{name}: found in the directory, not in this model" for name in self._sources if name not in known]
        if wrong:
            more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
            raise CheckpointError(
                f"--init_from={self._folder.location} holds another model: {'; '.join(wrong[:_NAMES_SHOWN])}{more}. "
                f"Give --model and its settings as in its config.json"
            )

    def fill(self, parts: Iterable[Part], *, patience: Patience | None = None) -> Iterator[str]:
        """Fill `parts` in place; yields the name of each when it is filled, in their order.

        Some blocks are read ahead of the one that is filled, so `parts` may be made one by one as they are asked for.
        Raises CheckpointError when a file changed meanwhile, StorageError when a bucket stops answering.
        """
        opened: dict[str, Ranges] = {}
        waiting: deque[tuple[_Block | str, Future[bytes | bytearray] | None]] = deque()
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            try:
                for step in self._steps(parts):
                    if isinstance(step, str):
                        waiting.append((step, None))
                    else:
                        ranges = self._ranges(step, opened, patience)
                        waiting.append((step, pool.submit(ranges.fetch, step.begin, step.end)))
                    if len(waiting) > _READS_AT_ONCE:
                        yield from _done(*waiting.popleft())
                while waiting:
                    yield from _done(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _steps(self, parts: Iterable[Part]) -> Iterator[_Block | str]:
        """The blocks of each part, and then its name."""
        for part in parts:
            for piece in pieces_in(part.name, part.shape, self._sources):
                yield from self._blocks(part, piece)
            yield part.name

    def _ranges(self, block: _Block, opened: dict[str, Ranges], patience: Patience | None) -> Ranges:
        if block.file not in opened:
            file = self._folder.files[block.file]
            with _readable(file.location):
                opened[block.file] = open_ranges(file.location, size_bytes=file.size_bytes, patience=patience)
        return opened[block.file]

    def _blocks(self, part: Part, piece: Piece) -> Iterator[_Block]:
        """What `piece` and the part have in common."""
        sizes = part.local.shape
        first = [max(mine, its) for mine, its in zip(part.starts, piece.offsets, strict=True)]
        end = [
            min(mine + num, its + size)
            for mine, num, its, size in zip(part.starts, sizes, piece.offsets, piece.sizes, strict=True)
        ]
        if any(high <= low for low, high in zip(first, end, strict=True)):
            return
        target = part.local[
            tuple(slice(low - mine, high - mine) for low, high, mine in zip(first, end, part.starts, strict=True))
        ]
        lows = [low - its for low, its in zip(first, piece.offsets, strict=True)]
        if piece.squeezed:
            target, lows = target[0], lows[1:]
        stored = self._folder.tensors[self._sources[piece.name]]
        dtype = _FLOATS[stored.dtype]
        strides = tuple(math.prod(stored.shape[dimension + 1 :]) for dimension in range(len(stored.shape)))
        for inside in _boxes(target.shape, strides, dtype.itemsize):
            box = target[inside]
            begin = stored.begin + dtype.itemsize * sum(
                (low + span.start) * stride for low, span, stride in zip(lows, inside, strides, strict=True)
            )
            yield _Block(stored.file, begin, begin + _span(box.shape, strides) * dtype.itemsize, dtype, strides, box)


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a box, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _boxes(sizes: Sequence[int], strides: Sequence[int], item_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Cut a box into boxes that one request reads each: not too long, and with little in them that is not wanted."""
    ahead = [tuple(slice(0, size) for size in sizes)]
    while ahead:
        box = ahead.pop()
        extents = [span.stop - span.start for span in box]
        span_bytes = _span(extents, strides) * item_bytes
        if span_bytes <= _BLOCK_BYTES and span_bytes - math.prod(extents) * item_bytes <= _IDLE_BYTES:
            yield box
            continue
        widest = next(dimension for dimension, extent in enumerate(extents) if extent > 1)
        span = box[widest]
        middle = (span.start + span.stop) // 2
        for half in (slice(middle, span.stop), slice(span.start, middle)):  # the first is taken next
            ahead.append((*box[:widest], half, *box[widest + 1 :]))


def _done(step: _Block | str, read: Future[bytes | bytearray] | None) -> Iterator[str]:
    """Fill a block; or say the name of the part whose last block it was."""
    if isinstance(step, str):
        yield step
        return
    assert read is not None
    with _readable(step.file):
        content = read.result()
    # torch warns of memory that it may not write.
    elements = torch.frombuffer(content if isinstance(content, bytearray) else bytearray(content), dtype=step.dtype)
    with torch.no_grad():
        step.target.copy_(elements.as_strided(step.target.shape, step.strides))


@contextlib.contextmanager
def _readable(location: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{location} cannot be read: {error.strerror or error}", shared_by_all_ranks=False
        ) from error
