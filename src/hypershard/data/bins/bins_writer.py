"""The files of token bins while they are written: what is in them is known at every moment and can be cut back to."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage import readable_errors
from .encoding_pool import EncodedBatch, Place
from .meta import SPLITS, FileMeta, SplitMeta
from .token_bins import STARTS_DTYPE, TARGETS_DTYPE, file_sha256

# Where the hash picks no document, the last one validates, unless it is a larger share of the tokens than this.
LARGEST_LAST_DOCUMENT = 0.1
MAX_WINDOW_TOKENS = 2**26
_COPY_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What a split holds."""

    num_tokens: int = 0
    num_documents: int = 0


@dataclass(frozen=True, kw_only=True)
class Point:
    """What the bins hold, up to the end of a document, and where reading goes on after it."""

    place: Place = field(default_factory=Place)
    train: SplitCounts = field(default_factory=SplitCounts)
    val: SplitCounts = field(default_factory=SplitCounts)
    num_malformed_rows: int = 0

    @property
    def num_documents(self) -> int:
        return self.train.num_documents + self.val.num_documents

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.val.num_tokens


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which split a document belongs to: a pure function of its file's name or of its index."""

    val_share: float
    seed: int
    has_val_files: bool

    def validates(self, document: int, file_split: str | None) -> bool:
        if self.has_val_files:
            return file_split == "val"
        digest = hashlib.blake2b(f"{self.seed} {document}".encode(), digest_size=8).digest()
        # Document 0 always trains, so that no choice of seed leaves nothing to train on.
        return document > 0 and int.from_bytes(digest, "little") < self.val_share * 2**64


class _SplitFiles:
    """The open files of one split. Everything is written at a place that follows from counts; nothing is buffered."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], *, has_targets: bool):
        self._dtypes = {f"{split}.bin": dtype, f"{split}.starts": STARTS_DTYPE}
        if has_targets:
            self._dtypes[f"{split}.targets"] = TARGETS_DTYPE
        self._folder = folder
        self._split = split
        self._descriptors: dict[str, int] = {}
        for name in self._dtypes:
            self._descriptors[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def sizes_bytes(self, counts: SplitCounts) -> dict[str, int]:
        """How long each file is when it holds `counts`."""
        starts = f"{self._split}.starts"
        return {
            name: dtype.itemsize * (counts.num_documents if name == starts else counts.num_tokens)
            for name, dtype in self._dtypes.items()
        }

    def holds(self, counts: SplitCounts) -> bool:
        sizes = self.sizes_bytes(counts)
        return all(os.fstat(self._descriptors[name]).st_size >= size for name, size in sizes.items())

    def truncate(self, counts: SplitCounts) -> None:
        for name, size_bytes in self.sizes_bytes(counts).items():
            os.ftruncate(self._descriptors[name], size_bytes)

    def sync(self) -> None:
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def write_tokens(self, tokens: NDArray[Any], targets: NDArray[np.uint8] | None, *, at: int) -> None:
        self._write(f"{self._split}.bin", tokens, at=at)
        if targets is not None:
            self._write(f"{self._split}.targets", targets, at=at)

    def write_starts(self, starts: NDArray[np.int64], *, at: int) -> None:
        self._write(f"{self._split}.starts", starts, at=at)

    def _write(self, name: str, values: NDArray[Any], *, at: int) -> None:
        dtype = self._dtypes[name]
        left = memoryview(np.ascontiguousarray(values, dtype=dtype).tobytes())
        offset = at * dtype.itemsize
        while left:
            written = os.pwrite(self._descriptors[name], left, offset)
            left, offset = left[written:], offset + written

    def tokens(self, start: int, count: int) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        """Tokens and targets written earlier."""
        targets = f"{self._split}.targets"
        return (
            self._read(f"{self._split}.bin", start, count),
            self._read(targets, start, count) if targets in self._dtypes else None,
        )

    def _read(self, name: str, start: int, count: int) -> NDArray[Any]:
        dtype = self._dtypes[name]
        return np.fromfile(self._folder / name, dtype=dtype, offset=start * dtype.itemsize, count=count)

    def starts(self, counts: SplitCounts) -> NDArray[np.int64]:
        """Where documents begin [num_documents], memory-mapped."""
        if not counts.num_documents:
            return np.empty(0, dtype=STARTS_DTYPE)
        path = self._folder / f"{self._split}.starts"
        return np.memmap(path, dtype=STARTS_DTYPE, mode="r", shape=(counts.num_documents,))

    def meta(self, counts: SplitCounts) -> SplitMeta:
        files = [
            FileMeta(name=name, size_bytes=size_bytes, sha256=file_sha256(self._folder / name))
            for name, size_bytes in self.sizes_bytes(counts).items()
        ]
        return SplitMeta(
            num_tokens=counts.num_tokens,
            num_documents=counts.num_documents,
            tokens=files[0],
            starts=files[1],
            targets=files[2] if len(files) == 3 else None,
        )


@dataclass(frozen=True, kw_only=True)
class _State:
    """A point, and how much of the document that begins there is in the files already, and in which split's."""

    point: Point
    open_tokens: int = 0
    open_split: str = "train"


class BinsWriter:
    """Appends batches to the bins of `folder`. Whatever interrupts it, `point` says what is whole."""

    def __init__(self, folder: Path, *, dtype: np.dtype[Any], has_targets: bool, rule: SplitRule):
        self._folder = folder
        self._rule = rule
        self._state = _State(point=Point())
        with readable_errors(folder, "writing token bins into"):
            self._splits = {name: _SplitFiles(folder, name, dtype, has_targets=has_targets) for name in SPLITS}

    def close(self) -> None:
        for files in self._splits.values():
            files.close()

    @property
    def point(self) -> Point:
        return self._state.point

    @property
    def num_tokens(self) -> int:
        """Written so far, those of an unfinished document too."""
        return self._state.point.num_tokens + self._state.open_tokens

    def go_to(self, point: Point) -> bool:
        """Go on after `point`; False when the files do not hold that much."""
        if not all(files.holds(getattr(point, name)) for name, files in self._splits.items()):
            return False
        self._state = _State(point=point)
        self.truncate()
        return True

    def truncate(self) -> None:
        """Cut what follows the point off the files."""
        point = self._state.point
        self._state = _State(point=point)
        with readable_errors(self._folder, "writing token bins into"):
            for name, files in self._splits.items():
                files.truncate(getattr(point, name))

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        with readable_errors(self._folder, "writing token bins into"):
            for files in self._splits.values():
                files.sync()

    def append(self, batch: EncodedBatch, *, splits: Sequence[str | None], place: Place) -> None:
        """Write a batch; `splits` of the files its pieces come from, `place` after its last whole document."""
        before = self._state
        # A document is one piece or several; the first may have begun, and the last may end, in another batch.
        document_of: NDArray[np.int64] = np.cumsum(batch.ends) - batch.ends
        first_piece = np.flatnonzero(np.diff(document_of, prepend=-1))
        lengths = np.add.reduceat(batch.lengths, first_piece)
        whole_lengths = lengths.copy()
        whole_lengths[0] += before.open_tokens
        is_whole = np.ones(len(lengths), dtype=np.bool_)
        is_whole[-1] = batch.ends[-1]
        to_val = np.zeros(len(lengths), dtype=np.bool_)
        # Empty documents are none: they have no index.
        for index, document in enumerate(np.flatnonzero(whole_lengths), start=before.point.num_documents):
            to_val[document] = self._rule.validates(index, splits[first_piece[document]])
        token_to_val = np.repeat(to_val[document_of], batch.lengths)
        counts = {}
        for name, files in self._splits.items():
            is_mine, token_is_mine = (to_val, token_to_val) if name == "val" else (~to_val, ~token_to_val)
            split: SplitCounts = getattr(before.point, name)
            num_open = before.open_tokens if before.open_split == name else 0
            mine = np.where(is_mine, lengths, 0)
            ends = split.num_tokens + num_open + np.cumsum(mine)
            starts = ends - mine
            starts[0] -= num_open
            targets = None if batch.targets is None else batch.targets[token_is_mine]
            new_starts = starts[is_mine & is_whole & (whole_lengths > 0)]
            with readable_errors(self._folder, "writing token bins into"):
                files.write_tokens(batch.tokens[token_is_mine], targets, at=split.num_tokens + num_open)
                files.write_starts(new_starts, at=split.num_documents)
            is_open = is_mine[-1] and not is_whole[-1]
            counts[name] = SplitCounts(
                num_tokens=int(starts[-1] if is_open else ends[-1]),
                num_documents=split.num_documents + len(new_starts),
            )
        # One assignment, so that an interrupt finds the state from before or from after.
        self._state = _State(
            point=Point(
                place=place,
                train=counts["train"],
                val=counts["val"],
                num_malformed_rows=before.point.num_malformed_rows + len(batch.malformed),
            ),
            open_tokens=0 if is_whole[-1] else int(whole_lengths[-1]),
            open_split="val" if to_val[-1] else "train",
        )

    def cut_val_from_train(self, val_share: float, *, whole_documents: bool) -> None:
        """Copy the end of train to val: the last document if it is short enough, else the last `val_share` of tokens.

        `whole_documents`: the last one, however long, of two or more. Afterwards `point` is without it in train;
        `truncate` takes it out of the file.
        """
        point = self._state.point
        num_tokens = point.train.num_tokens
        starts = self._splits["train"].starts(point.train)
        num_cut = min(max(2, math.ceil(num_tokens * val_share)), num_tokens - 2)
        window_tokens = min(int(num_tokens * LARGEST_LAST_DOCUMENT), MAX_WINDOW_TOKENS)
        if whole_documents or starts[-1] > num_tokens - window_tokens:
            num_cut = max(2, num_tokens - int(starts[-1]))
        cut = num_tokens - num_cut
        num_left = int(np.searchsorted(starts, cut))
        moved = np.asarray(starts[num_left:]) - cut
        if not len(moved) or moved[0] != 0:  # a document cut in two counts on both sides
            moved = np.concatenate([[0], moved])
        with readable_errors(self._folder, "writing token bins into"):
            for begin in range(cut, num_tokens, _COPY_TOKENS):
                tokens, targets = self._splits["train"].tokens(begin, min(_COPY_TOKENS, num_tokens - begin))
                self._splits["val"].write_tokens(tokens, targets, at=point.val.num_tokens + begin - cut)
            self._splits["val"].write_starts(moved + point.val.num_tokens, at=point.val.num_documents)
        val = SplitCounts(num_tokens=point.val.num_tokens + num_cut, num_documents=point.val.num_documents + len(moved))
        train = SplitCounts(num_tokens=cut, num_documents=num_left)
        self._state = _State(point=dataclasses.replace(point, train=train, val=val))

    def longest_document_tokens(self) -> int:
        """Of both splits, end token included."""
        longest = 0
        for name, files in self._splits.items():
            counts: SplitCounts = getattr(self.point, name)
            starts = files.starts(counts)
            for begin in range(0, len(starts), _COPY_TOKENS):
                part = np.asarray(starts[begin : begin + _COPY_TOKENS + 1])
                if len(part) <= _COPY_TOKENS:  # the last document ends where the split does
                    part = np.append(part, counts.num_tokens)
                longest = max(longest, int(np.diff(part).max()))
        return longest

    def finish(self) -> dict[str, SplitMeta]:
        """Everything on the disk, and its checksums."""
        self.truncate()
        self.sync()
        with readable_errors(self._folder, "reading"):
            return {name: files.meta(getattr(self.point, name)) for name, files in self._splits.items()}
