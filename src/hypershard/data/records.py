"""What goes from files to token ids: a file to read, a document as it lies there, and what it becomes. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One file of a data set: a local path, or a URL such as s3://… or hf://….

    `version` changes when the content does (time of change, ETag, or a hub's blob id); `split` is 'train' or 'val'
    where a name or a data card says so, else None.
    """

    location: str
    size_bytes: int
    version: str
    split: str | None

    @property
    def name(self) -> str:
        return self.location.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of `count` parts of a file that together hold each of its documents once."""

    index: int
    count: int


WHOLE = Part(index=0, count=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDocument:
    """A document as it lies in its file, or a piece of a long text, before anything is parsed.

    `content`: a JSON line (bytes), text (str), or a row of a table (a mapping). `number` is the line or row in the
    file, from 1. Pieces of one document follow one another, and all but the last have `ends_document` False.
    `read_bytes` says how far the file, as stored, has been read. Lines of a part that starts in the middle of a file
    are counted from `first_byte` on.
    """

    content: bytes | str | Mapping[str, Any]
    location: str
    number: int
    ends_document: bool
    read_bytes: int
    first_byte: int = 0

    @property
    def where(self) -> str:
        """For error messages."""
        unit = "row" if isinstance(self.content, Mapping) else "line"
        counted = f" (counted from byte {self.first_byte})" if self.first_byte else ""
        return f"{self.location} {unit} {self.number}{counted}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of a (piece of a) document, end-of-document token included where it ends; none for an empty one.

    `targets` [n] says which tokens the loss counts when they are predicted; None: all of them. Of a pair of answers
    `second_start` is where the second sequence, the rejected one, begins.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_] | None
    second_start: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Malformed:
    """A row that cannot be encoded, and why."""

    where: str
    reason: str


class Encoder(Protocol):
    """Documents -> tokens; made from an `EncoderSpec`, in whatever process needs it."""

    def encode(self, documents: list[RawDocument]) -> list[Encoded | Malformed]:
        """One result for each document, in order."""
        ...
