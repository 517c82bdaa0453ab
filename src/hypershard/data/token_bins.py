"""Token bins: a folder with train.bin, val.bin, meta.json. The one format that training reads.

A .bin file is nothing but token ids, little-endian, uint16 where the vocabulary fits and uint32 else, so it
can be memory-mapped at any size. meta.json says what they are and is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..storage import read_json

META_FILE = "meta.json"
FORMAT = "hypershard token bins"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_MAKE_AGAIN = "make the folder again with `hypershard prepare` (or delete it, if it is one kept in --cache_dir)"


@dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """One .bin file."""

    file: str
    num_tokens: int
    num_documents: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BinsMeta:
    """The content of meta.json."""

    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_token_id: int | None
    tokenizer_file: str | None
    tokenizer_sha256: str | None
    train: SplitMeta
    val: SplitMeta

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)


def dtype_for(vocab_size: int) -> str:
    """The smallest stored type that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Little-endian on every machine."""
    return np.dtype(_DTYPES[name])


def read_meta(folder: Path) -> BinsMeta:
    """meta.json of `folder`, checked key by key. DataError: missing, damaged, or of another version."""
    path = folder / META_FILE
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"--dataset={folder}: found no {META_FILE}; expected a folder of token bins; {_MAKE_AGAIN}"
        ) from None
    except ValueError as error:
        raise DataError(f"--dataset={folder}: {path} is damaged ({error}); {_MAKE_AGAIN}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"--dataset={folder}: {path} does not say format {FORMAT!r}, format_version {FORMAT_VERSION}; {_MAKE_AGAIN}"
        )
    try:
        splits = {name: _typed(SplitMeta, value[name]) for name in SPLITS}
        meta: BinsMeta = _typed(BinsMeta, value | splits)
    except (KeyError, TypeError) as error:
        raise DataError(f"--dataset={folder}: {path} is incomplete or wrong at {error}; {_MAKE_AGAIN}") from error
    if meta.dtype not in _DTYPES:
        raise DataError(f"--dataset={folder}: {path} has dtype {meta.dtype!r}; expected one of {', '.join(_DTYPES)}")
    return meta


_JSON_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "SplitMeta": SplitMeta,
}


def _typed(cls: Any, value: dict[str, Any]) -> Any:
    """Build the dataclass `cls` from `value`; KeyError or TypeError naming the key that is missing or wrong."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, type_name in fields.items():
        if not isinstance(value[name], _JSON_TYPES[str(type_name)]):
            raise TypeError(f"{name}: found {value[name]!r}, expected {type_name}")
    return cls(**{name: value[name] for name in fields})


class TokenBins:
    """One split of a folder of token bins, memory-mapped; a `TokenSource`."""

    def __init__(self, folder: Path, split: str, meta: BinsMeta):
        """Open the split `train` or `val`. DataError: missing file, size other than meta.json's, or no tokens."""
        self._meta = meta
        self._folder = folder
        self._split: SplitMeta = getattr(meta, split)
        self._path = folder / self._split.file
        dtype = numpy_dtype(meta.dtype)
        expected_bytes = self._split.num_tokens * dtype.itemsize
        if not self._path.is_file():
            raise DataError(
                f"--dataset={folder}: {self._path} is missing; expected {expected_bytes} bytes; {_MAKE_AGAIN}"
            )
        found_bytes = self._path.stat().st_size
        if found_bytes != expected_bytes:
            raise DataError(
                f"--dataset={folder}: {self._path} has {found_bytes} bytes; expected {expected_bytes} "
                f"({self._split.num_tokens} tokens of {dtype.itemsize} bytes); copy it again, or {_MAKE_AGAIN}"
            )
        if self._split.num_tokens < 2:
            raise DataError(
                f"--dataset={folder}: the split '{split}' holds {self._split.num_tokens} tokens; expected at least 2 "
                "(one to read, one to predict); give --dataset more text"
            )
        self._tokens: NDArray[Any] = np.memmap(self._path, dtype=dtype, mode="r")

    @property
    def num_tokens(self) -> int:
        return self._split.num_tokens

    @property
    def num_documents(self) -> int:
        return self._split.num_documents

    @property
    def eos_token_id(self) -> int | None:
        return self._meta.eos_token_id

    @property
    def vocab_size(self) -> int:
        return self._meta.vocab_size

    @property
    def fingerprint(self) -> str:
        """Of the tokens and what they mean, from meta.json: the same for a copy, another one for other data."""
        meaning = (self._split.sha256, self._meta.dtype, self._meta.eos_token_id, self._meta.tokenizer_sha256)
        return hashlib.sha256(repr(meaning).encode()).hexdigest()[:32]

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
                f"the file is damaged: copy it again, or {_MAKE_AGAIN}",
                shared_by_all_ranks=False,
            )
        return tokens


def open_token_bins(folder: Path) -> tuple[TokenBins, TokenBins]:
    """The splits (train, val) of a folder of token bins.

    DataError: see `read_meta` and `TokenBins`; or the tokenizer is missing or another one.
    """
    meta = read_meta(folder)
    train, val = (TokenBins(folder, split, meta) for split in SPLITS)
    if train.tokenizer_path is not None:
        if not train.tokenizer_path.is_file():
            raise DataError(f"--dataset={folder}: {train.tokenizer_path} is missing; {_MAKE_AGAIN}")
        if file_sha256(train.tokenizer_path) != meta.tokenizer_sha256:
            raise DataError(
                f"--dataset={folder}: {train.tokenizer_path} is not the tokenizer that made the tokens; {_MAKE_AGAIN}"
            )
    return train, val


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
