"""What fills one sequence, and where indexable rows come from: windows of a row of tokens, or packs of documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .packs import PackPlan
from .source import TokenSource

_FEW_STARTS = 64  # so many documents in a row are counted faster one by one than by a running maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """At most context_tokens + 1 tokens: all but the last are inputs, all but the first may be predicted.

    `positions` count from 0 in each document (in the whole row, where documents may see each other); `targets` says
    which tokens the loss counts when they are predicted, and is never True for the first token of a document.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.bool_]


class Rows(Protocol):
    """Rows by number: 0 to `num_samples` - 1 are an epoch; a number beyond gives what is left there, or nothing."""

    @property
    def num_samples(self) -> int: ...

    def row(self, index: int) -> Row: ...

    def documents(self, index: int) -> list[str]:
        """Where the row's tokens come from, for people: the ledger prints it."""
        ...


def row_of(
    tokens: NDArray[np.int64], *, starts: NDArray[np.int64], targets: NDArray[np.bool_] | None, document_mask: bool
) -> Row:
    """A row of `tokens` [n] whose documents begin at the places `starts` (0, where the row begins, is always one).

    `targets` [n]: which tokens the loss counts; None: all. What begins a document is never predicted.
    """
    places = np.arange(len(tokens))
    counted = np.ones(len(tokens), dtype=bool) if targets is None else targets.copy()
    counted[:1] = False
    if not document_mask:
        return Row(tokens=tokens, positions=places, targets=counted)
    counted[starts] = False
    if len(starts) <= _FEW_STARTS:
        positions = places.copy()
        for start in starts.tolist():
            positions[start:] = places[: len(places) - start]
        return Row(tokens=tokens, positions=positions, targets=counted)
    begins = np.zeros(len(tokens), dtype=np.int64)
    begins[starts] = starts
    return Row(tokens=tokens, positions=places - np.maximum.accumulate(begins), targets=counted)


EMPTY = Row(
    tokens=np.empty(0, dtype=np.int64), positions=np.empty(0, dtype=np.int64), targets=np.empty(0, dtype=np.bool_)
)


class Windows:
    """Row i holds tokens [i*T, i*T + T] of the source: T + 1 of them, the last shared with the next row, where it is
    the first input. So N = (num_tokens - 1) // T rows, each token a target once."""

    def __init__(self, source: TokenSource, *, context_tokens: int, document_mask: bool):
        self._source = source
        self._context_tokens = context_tokens
        self._document_mask = document_mask
        self.num_samples = max(0, source.num_tokens - 1) // context_tokens

    def row(self, index: int) -> Row:
        source, start = self._source, index * self._context_tokens
        count = min(self._context_tokens + 1, source.num_tokens - start)
        if count < 2:
            return EMPTY
        tokens = source.read(start, count)
        starts = self._starts(tokens, start) if self._document_mask else np.empty(0, dtype=np.int64)
        return row_of(tokens, starts=starts, targets=source.targets(start, count), document_mask=self._document_mask)

    def documents(self, index: int) -> list[str]:
        start = index * self._context_tokens
        return [_described(self._source, start, min(self._context_tokens + 1, self._source.num_tokens - start))]

    def _starts(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """Places in the window at which documents begin, its own first place left out."""
        starts = self._source.document_starts
        if starts is not None:
            first, last = np.searchsorted(starts, (start + 1, start + len(tokens)))
            return np.asarray(starts[first:last]) - start
        return np.flatnonzero(tokens[:-1] == self._source.eos_token_id) + 1


class Packs:
    """Row i holds the pieces of documents that a plan puts together; of a pair both sequences, the chosen one first."""

    def __init__(self, source: TokenSource, plan: PackPlan, *, document_mask: bool):
        self._source = source
        self._plan = plan
        self._document_mask = document_mask
        self.num_samples = plan.num_packs

    def row(self, index: int) -> Row:
        if index >= self.num_samples:
            return EMPTY
        begins, lengths = self._plan.pieces_of(index)
        pieces = [(int(begin), int(length)) for begin, length in zip(begins, lengths, strict=True)]
        starts = self._starts(pieces)
        targets = [self._source.targets(begin, length) for begin, length in pieces]
        return row_of(
            np.concatenate([self._source.read(begin, length) for begin, length in pieces]),
            starts=starts,
            targets=None if targets[0] is None else np.concatenate([part for part in targets if part is not None]),
            document_mask=self._document_mask,
        )

    def _starts(self, pieces: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Places in the row at which sequences begin: one for each piece, two for a pair."""
        starts, place = [], 0
        for begin, length in pieces:
            starts.append(place)
            second = self._source.second_start(begin, length)
            if second is not None:
                starts.append(place + second)
            place += length
        return np.array(starts, dtype=np.int64)

    def documents(self, index: int) -> list[str]:
        begins, lengths = self._plan.pieces_of(index)
        return [_described(self._source, *piece) for piece in zip(begins.tolist(), lengths.tolist(), strict=True)]


def _described(source: TokenSource, start: int, count: int) -> str:
    """Tokens [start, start + count) and, where the source knows them, the documents they lie in, counted from 0."""
    tokens = f"tokens {start} to {start + count - 1}"
    if source.document_starts is None:
        return tokens
    first, last = np.searchsorted(source.document_starts, (start, start + count - 1), side="right") - 1
    return f"document {first} ({tokens})" if first == last else f"documents {first} to {last} ({tokens})"
