"""Documents -> rows of whole documents, long ones cut: packed best fit, or one in each row.

Windows of a long row of tokens cut documents wherever a window ends. Packs hold whole documents instead, and a little
padding, as in "Fewer Truncations Improve Language Modeling" (Ding et al., 2024, arXiv:2404.10830).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONG_DOCUMENTS = ("split", "truncate", "drop")

_Indices = NDArray[np.int64]
# (lengths of pieces, most tokens of a pack) -> (pack of each piece, number of packs)
_Place = Callable[[_Indices, int], tuple[_Indices, int]]


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which pieces of a row of tokens make up each pack.

    Pack p holds the pieces first_piece[p] to first_piece[p + 1] - 1, at most `context_tokens` + 1 tokens in all; piece
    i is the tokens piece_starts[i] and the piece_lengths[i] - 1 after it. A split document's pieces share one token,
    the last label of one and the first input of the next, so each token but a document's first is predicted once.
    """

    context_tokens: int
    piece_starts: _Indices
    piece_lengths: _Indices
    first_piece: _Indices  # [num_packs + 1]
    num_split_documents: int
    num_truncated_documents: int
    num_dropped_documents: int
    num_short_documents: int  # of fewer than two tokens: they predict nothing, and are left out
    num_cut_tokens: int  # tokens of truncated, dropped and short documents that are in no pack

    @property
    def num_packs(self) -> int:
        return len(self.first_piece) - 1

    @property
    def padding_share(self) -> float:
        """Share of all label places (`context_tokens` in a pack) that no token fills; 0 without packs."""
        places = self.num_packs * self.context_tokens
        return 1 - (int(self.piece_lengths.sum()) - self.num_packs) / places if places else 0.0

    def pieces_of(self, pack: int) -> tuple[_Indices, _Indices]:
        """(starts, lengths) of a pack's pieces, in the order of the tokens; for 0 <= pack < num_packs."""
        pieces = slice(self.first_piece[pack], self.first_piece[pack + 1])
        return self.piece_starts[pieces], self.piece_lengths[pieces]


def best_fit(starts: _Indices, *, num_tokens: int, context_tokens: int, long_documents: str) -> PackPlan:
    """Pack the documents that begin at `starts` [num_documents], the last of which ends at `num_tokens`.

    Packs hold at most context_tokens + 1 tokens; the last of a full pack is only ever a label. Documents longer than
    that are cut into pieces that fit ('split'), lose what does not fit ('truncate'), or are left out ('drop').
    Best-fit decreasing: from the longest piece on, each goes to the fullest pack that has room for it. The same
    input gives the same plan, whose packs are in the order of their first tokens.
    """
    return _plan(starts, _best_fit_decreasing, num_tokens, context_tokens, long_documents)


def one_each(starts: _Indices, *, num_tokens: int, context_tokens: int, long_documents: str) -> PackPlan:
    """As `best_fit`, but each document, or each piece of a split one, has a pack to itself."""
    return _plan(starts, _one_by_one, num_tokens, context_tokens, long_documents)


# --packing -> how its packs are planned; 'concat' has none
PACKINGS = {"best_fit": best_fit, "none": one_each}


def _plan(starts: _Indices, place: _Place, num_tokens: int, context_tokens: int, long_documents: str) -> PackPlan:
    assert long_documents in LONG_DOCUMENTS, long_documents
    assert context_tokens >= 1, context_tokens
    size = context_tokens + 1
    lengths = np.diff(starts, append=num_tokens)
    assert lengths.size == 0 or lengths.min() >= 0, "documents begin one after another, before the end of the tokens"
    is_short, is_long = lengths < 2, lengths > size
    piece_starts, piece_lengths = _pieces(starts, lengths, size, keep=~is_short, long_documents=long_documents)
    num_long = int(is_long.sum())
    kept = piece_lengths.sum() if long_documents != "split" else lengths[~is_short].sum()
    packs, num_packs = place(piece_lengths, size)
    # Number packs by their first piece, so that reading them one after another reads the file nearly in order.
    first_seen = np.full(num_packs, len(packs), dtype=np.int64)
    np.minimum.at(first_seen, packs, np.arange(len(packs)))
    numbers = np.empty(num_packs, dtype=np.int64)
    numbers[np.argsort(first_seen)] = np.arange(num_packs)
    packs = numbers[packs]
    order = np.argsort(packs, kind="stable")
    return PackPlan(
        context_tokens=context_tokens,
        piece_starts=piece_starts[order],
        piece_lengths=piece_lengths[order],
        first_piece=np.concatenate(([0], np.cumsum(np.bincount(packs, minlength=num_packs)))).astype(np.int64),
        num_split_documents=num_long if long_documents == "split" else 0,
        num_truncated_documents=num_long if long_documents == "truncate" else 0,
        num_dropped_documents=num_long if long_documents == "drop" else 0,
        num_short_documents=int(is_short.sum()),
        num_cut_tokens=int(lengths.sum() - kept),
    )


def _pieces(
    starts: _Indices, lengths: _Indices, size: int, *, keep: NDArray[np.bool_], long_documents: str
) -> tuple[_Indices, _Indices]:
    """(starts, lengths) of what goes into packs: each between 2 and `size` tokens, in the order of the tokens."""
    if long_documents == "drop":
        keep = keep & (lengths <= size)
    starts, lengths = starts[keep].astype(np.int64), lengths[keep].astype(np.int64)
    if long_documents != "split":
        return starts, np.minimum(lengths, size)
    step = size - 1  # pieces share a token
    num_pieces = -((1 - lengths) // step)  # ceil((length - 1) / step)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    offsets = (np.arange(len(document)) - first[document]) * step
    return starts[document] + offsets, np.minimum(lengths[document] - offsets, size)


def _one_by_one(lengths: _Indices, size: int) -> tuple[_Indices, int]:
    return np.arange(len(lengths), dtype=np.int64), len(lengths)


def _best_fit_decreasing(lengths: _Indices, size: int) -> tuple[_Indices, int]:
    """(pack of each piece, number of packs) for pieces of at most `size` tokens.

    Pieces of one length and packs with one number of free tokens are moved together: of `free // length` pieces that
    fit into a pack, best fit puts all in, since after each that pack is the fullest with room. So the work grows with
    the number of different lengths, not with that of pieces.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    distinct, first = np.unique(-lengths[order], return_index=True)
    groups = zip((-distinct).tolist(), np.split(order, first[1:]), strict=True) if len(order) else ()
    open_packs = _OpenPacks()
    num_packs = 0
    for length, group in groups:
        pieces = group
        while pieces.size:
            free, chosen = open_packs.take(length, most=pieces.size)
            if not chosen.size:
                free = size
                chosen = np.arange(num_packs, num_packs - (-pieces.size // (size // length)))
                num_packs += chosen.size
            each = free // length
            placed = min(pieces.size, chosen.size * each)
            packs[pieces[:placed]] = np.repeat(chosen, each)[:placed]
            full, rest = divmod(placed, each)
            open_packs.put(free - each * length, chosen[:full])
            open_packs.put(free - rest * length, chosen[full:])
            pieces = pieces[placed:]
    return packs, num_packs


class _OpenPacks:
    """Packs by their number of free tokens. The numbers in use are bits of one integer, so the next is soon found."""

    def __init__(self) -> None:
        self._packs: dict[int, list[_Indices]] = {}
        self._in_use = 0

    def put(self, free: int, packs: _Indices) -> None:
        if packs.size and free >= 2:  # no piece is shorter
            self._packs.setdefault(free, []).append(packs)
            self._in_use |= 1 << free

    def take(self, length: int, *, most: int) -> tuple[int, _Indices]:
        """(free tokens, packs): some of the fullest packs with room for `length`, no more than `most` pieces need."""
        above = self._in_use >> length
        if not above:
            return 0, np.empty(0, dtype=np.int64)
        free = length + (above & -above).bit_length() - 1
        held = self._packs[free]
        packs = held.pop()
        needed = -(-most // (free // length))
        if packs.size > needed:
            held.append(packs[needed:])
            packs = packs[:needed]
        if not held:
            del self._packs[free]
            self._in_use &= ~(1 << free)
        return free, packs
