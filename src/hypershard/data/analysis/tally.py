"""Counting documents one by one in bounded memory: their lengths, and which of them occur twice."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bins.prepare import Progress
from ..records import Malformed
from .measured import Measured

# Hashes kept to find duplicates, 32 bytes each: exact up to so many documents, from a sample beyond.
MOST_HASHES = 2**23
NUM_EXAMPLES = 5  # of duplicates, near-empty and malformed rows that are named


class Tally:
    """Everything counted so far."""

    def __init__(self, near_empty_tokens: int):
        self._near_empty_tokens = near_empty_tokens
        self.lengths: Counter[int] = Counter()
        self.hashes = Hashes(MOST_HASHES)
        self.num_rows = self.num_target_tokens = self.num_near_empty = self.num_malformed = 0
        self.near_empty: list[str] = []
        self.malformed: list[str] = []
        self._num_tokens = 0
        self._read_bytes = 0
        self._block = (0, 0)  # samples and bytes at the last place where both are known

    def add(self, document: Measured | Malformed) -> None:
        self.num_rows += 1
        if isinstance(document, Malformed):
            self.num_malformed += 1
            if len(self.malformed) < NUM_EXAMPLES:
                self.malformed.append(f"{document.where}: {document.reason}")
            return
        # Readers tell of blocks: what is read before a block's first document is exact, not what is read within it.
        if document.read_bytes != self._read_bytes:
            self._block = (self.hashes.num_added, self._read_bytes)
            self._read_bytes = document.read_bytes
        # The end token, which a document of any length has, says nothing.
        if document.num_target_tokens - 1 < self._near_empty_tokens:
            self.num_near_empty += 1
            if len(self.near_empty) < NUM_EXAMPLES:
                self.near_empty.append(f"{document.place} {document.number}")
        if not document.num_tokens:
            return
        self.lengths[document.num_tokens] += 1
        self._num_tokens += document.num_tokens
        self.num_target_tokens += document.num_target_tokens
        self.hashes.add(document)

    def estimated_samples(self, total_bytes: int) -> int | None:
        num_samples, read_bytes = self._block
        return round(num_samples * total_bytes / read_bytes) if num_samples and read_bytes else None

    def progress(self, total_bytes: int, limit: int | None) -> Progress:
        """`limit` documents are all there is to do, where there is one."""
        if limit is not None:
            total_bytes = min(total_bytes, self._read_bytes * limit // self.num_rows)
        return Progress(
            read_bytes=self._read_bytes,
            total_bytes=total_bytes,
            num_documents=self.num_rows,
            num_tokens=self._num_tokens,
        )


class Hashes:
    """Documents' hashes, with where they stand, to find those that occur twice.

    When `most` are kept, half of all hash values are forgotten, those documents and all to come, and so again and
    again. A document's copies share its hash, so they stay or go together, and counts are scaled up.
    """

    def __init__(self, most: int):
        self._most = most
        self._halvings = 0
        self._columns = tuple(array(code) for code in "QQqq")  # high and low half of the hash, place, number
        self._places: dict[str, int] = {}
        self.num_added = 0

    @property
    def is_sample(self) -> bool:
        return self._halvings > 0

    def add(self, document: Measured) -> None:
        self.num_added += 1
        high = int.from_bytes(document.digest[:8], "big")
        if self._halvings and high >> (64 - self._halvings):
            return
        place = self._places.setdefault(document.place, len(self._places))
        low = int.from_bytes(document.digest[8:], "big")
        for column, value in zip(self._columns, (high, low, place, document.number), strict=True):
            column.append(value)
        if len(self._columns[0]) >= self._most:
            self._halve()

    def _halve(self) -> None:
        self._halvings += 1
        kept = self._numpy(0) >> np.uint64(64 - self._halvings) == 0
        self._columns = tuple(
            array(column.typecode, self._numpy(index)[kept].tobytes()) for index, column in enumerate(self._columns)
        )

    def _numpy(self, index: int) -> NDArray[Any]:
        column = self._columns[index]
        return np.frombuffer(column, dtype=np.uint64 if column.typecode == "Q" else np.int64)

    def duplicates(self) -> tuple[int, tuple[str, ...]]:
        """How many documents there are beyond the different ones, and where the first few of those stand."""
        high, low, place, number = (self._numpy(index) for index in range(4))
        order = np.lexsort((np.arange(len(high)), low, high))
        again = np.zeros(len(high), dtype=bool)
        again[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        # Each document's first copy: where its run of equal hashes begins.
        first = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(high))))]
        shown = np.flatnonzero(again)[np.argsort(order[again])[:NUM_EXAMPLES]]
        names = list(self._places)
        told = tuple(
            " is the same as ".join(f"{names[place[index]]} {number[index]}" for index in (order[one], first[one]))
            for one in shown.tolist()
        )
        return int(again.sum()) << self._halvings, told
