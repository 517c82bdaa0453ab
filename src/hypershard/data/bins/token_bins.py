"""Token bins: a folder with the tokens of both splits and meta.json. The one format that training reads.

    train.bin, val.bin          token ids, little-endian, uint16 where the vocabulary fits and uint32 else
    train.starts, val.starts    int64, little-endian: where each document begins, counted in tokens
    train.targets, val.targets  uint8: 1 where the loss counts the token; only where it does not count all of them. In
                                preferences 2 where the rejected sequence begins, whose first token is never counted
    meta.json                   what they are, with sizes and checksums; written last

Nothing but numbers is in the first three, so they can be memory-mapped at any size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..kinds import PREFERENCE
from .meta import DTYPES, MAKE_AGAIN, SPLITS, BinsMeta, FileMeta, SplitMeta, read_meta

STARTS_NAMES = tuple(f"{split}.starts" for split in SPLITS)
STARTS_DTYPE = np.dtype("<i8")
TARGETS_DTYPE = np.dtype("u1")
COUNTED, SECOND_START = 1, 2  # of targets; 0: not counted


def dtype_for(vocab_size: int) -> str:
    """The smallest stored type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Little-endian on every machine."""
    return np.dtype(DTYPES[name])


class TokenBins:
    """One split of a folder of token bins, memory-mapped; a `TokenSource`."""

    def __init__(self, folder: Path, split: str, meta: BinsMeta):
        """Open the split `train` or `val`. DataError: missing file, size other than meta.json's, or no tokens."""
        self._meta = meta
        self._folder = folder
        self._split: SplitMeta = getattr(meta, split)
        self._path = folder / self._split.tokens.name
        num_tokens = self._split.num_tokens
        tokens = self._mapped(self._split.tokens, numpy_dtype(meta.dtype), num_tokens)
        starts = self._mapped(self._split.starts, STARTS_DTYPE, self._split.num_documents)
        targets = None if self._split.targets is None else self._mapped(self._split.targets, TARGETS_DTYPE, num_tokens)
        if tokens is None or starts is None or num_tokens < 2:
            raise DataError(
                f"--dataset={folder}: the split '{split}' holds {num_tokens} tokens; expected at least 2 "
                "(one to read, one to predict); give --dataset more text"
            )
        self._tokens, self._starts, self._targets = tokens, starts, targets

    def _mapped(self, file: FileMeta, dtype: np.dtype[Any], count: int) -> NDArray[Any] | None:
        """The `count` numbers in `file`, None for none. DataError: it is missing or of another size."""
        path = self._folder / file.name
        expected_bytes = count * dtype.itemsize
        if not path.is_file():
            raise DataError(
                f"--dataset={self._folder}: {path} is missing; expected {expected_bytes} bytes; {MAKE_AGAIN}"
            )
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes:
            raise DataError(
                f"--dataset={self._folder}: {path} has {found_bytes} bytes; expected {expected_bytes} "
                f"({count} numbers of {dtype.itemsize} bytes); copy it again, or {MAKE_AGAIN}"
            )
        # As a plain array: each slice of a memmap makes another memmap, which takes longer than the slice.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if count else None

    @property
    def num_tokens(self) -> int:
        return self._split.num_tokens

    @property
    def num_documents(self) -> int:
        return self._split.num_documents

    @property
    def kind(self) -> str:
        """What its documents are: one of KINDS."""
        return self._meta.kind

    @property
    def eos_token_id(self) -> int | None:
        return self._meta.eos_token_id

    @property
    def vocab_size(self) -> int:
        return self._meta.vocab_size

    @property
    def fingerprint(self) -> str:
        """Of the tokens and what they mean, from meta.json: the same for a copy, another one for other data."""
        files = tuple(file.sha256 for file in self._split.files)
        meaning: tuple[Any, ...] = (files, self._meta.dtype, self._meta.eos_token_id, self._meta.tokenizer_sha256)
        if self.kind == PREFERENCE:  # text and conversations differ in their files, and keep the name they had
            meaning += (self.kind,)
        return hashlib.sha256(repr(meaning).encode()).hexdigest()[:32]

    @property
    def document_starts(self) -> NDArray[np.int64] | None:
        """First token of each document [num_documents], rising from 0, memory-mapped."""
        return self._starts

    @property
    def tokenizer_path(self) -> Path | None:
        return None if self._meta.tokenizer_file is None else self._folder / self._meta.tokenizer_file

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Token ids [count], copied. DataError when an id is not below `vocab_size`: the file is damaged."""
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        tokens = self._tokens[start : start + count].astype(np.int64)
        if count and int(tokens.max()) >= self.vocab_size:
            where = int(tokens.argmax())
            raise DataError(
                f"--dataset={self._folder}: {self._path} holds id {tokens[where]} at token {start + where}; "
                f"expected ids below {self.vocab_size} (its tokenizer's vocabulary); "
                f"the file is damaged: copy it again, or {MAKE_AGAIN}",
                shared_by_all_ranks=False,
            )
        return tokens

    def targets(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which tokens [count] the loss counts when they are predicted; None: all of the split.

        DataError: a value that has no meaning.
        """
        stored = self._stored_targets(start, count)
        return None if stored is None else stored == COUNTED

    def second_start(self, start: int, count: int) -> int | None:
        """Where in the document [start, start + count) of a pair the second sequence begins; None: these are no pairs.

        DataError: the file of targets is damaged, so that it does not say.
        """
        stored = self._stored_targets(start, count) if self.kind == PREFERENCE else None
        if stored is None:
            return None
        found = np.flatnonzero(stored == SECOND_START).tolist()
        # Each sequence has a token to read and one to predict.
        if len(found) != 1 or not 2 <= found[0] <= count - 2:
            raise self._damaged_targets(
                f"marks {len(found)} places ({', '.join(map(str, found[:3]))}) in the pair of {count} tokens from "
                f"token {start} on; expected one, where its second answer begins"
            )
        return int(found[0])

    def _stored_targets(self, start: int, count: int) -> NDArray[np.uint8] | None:
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        if self._targets is None:
            return None
        stored = self._targets[start : start + count]
        largest = SECOND_START if self.kind == PREFERENCE else COUNTED
        if count and int(stored.max()) > largest:
            where = int(stored.argmax())
            expected = "0, 1 or 2" if largest == SECOND_START else "0 or 1"
            raise self._damaged_targets(f"holds {stored[where]} at token {start + where}; expected {expected}")
        return stored

    def _damaged_targets(self, what: str) -> DataError:
        return DataError(
            f"--dataset={self._folder}: the file of targets {what}; the file is damaged: copy it again, or "
            f"{MAKE_AGAIN}",
            shared_by_all_ranks=False,
        )


def open_token_bins(folder: Path) -> tuple[TokenBins, TokenBins]:
    """The splits (train, val) of a folder of token bins.

    DataError: see `read_meta` and `TokenBins`; or the tokenizer is missing or another one.
    """
    meta = read_meta(folder)
    train, val = (TokenBins(folder, split, meta) for split in SPLITS)
    if train.tokenizer_path is not None:
        if not train.tokenizer_path.is_file():
            raise DataError(f"--dataset={folder}: {train.tokenizer_path} is missing; {MAKE_AGAIN}")
        if file_sha256(train.tokenizer_path) != meta.tokenizer_sha256:
            raise DataError(
                f"--dataset={folder}: {train.tokenizer_path} is not the tokenizer that made the tokens; {MAKE_AGAIN}"
            )
    return train, val


def verify(folder: Path) -> list[str]:
    """What is wrong with a folder of token bins, one line each; reads all of it and compares every checksum.

    None found: each file is, byte for byte, as `prepare` wrote it.
    """
    try:
        meta = read_meta(folder)
    except DataError as error:
        return [str(error)]
    expected = [(file.name, file.sha256) for name in SPLITS for file in getattr(meta, name).files]
    if meta.tokenizer_file is not None and meta.tokenizer_sha256 is not None:
        expected.append((meta.tokenizer_file, meta.tokenizer_sha256))
    problems = []
    for name, sha256 in expected:
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror}; expected sha256 {sha256}")
            continue
        if found != sha256:
            problems.append(f"{folder / name}: found sha256 {found}; expected {sha256}")
    return problems


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
