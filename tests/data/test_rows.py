"""Rows keep documents apart: positions restart, nothing is predicted across a border."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hypershard.data.packs import best_fit
from hypershard.data.rows import EMPTY, Packs, Windows, row_of

EOS = 9


class Tokens:
    """A source in memory."""

    vocab_size = 100
    fingerprint = "tokens"
    tokenizer_path: Path | None = None

    def __init__(self, tokens: list[int], *, starts: list[int] | None = None, targets: list[int] | None = None):
        self._tokens = np.array(tokens, dtype=np.int64)
        self._targets = None if targets is None else np.array(targets, dtype=bool)
        self.num_tokens = len(tokens)
        self.document_starts = None if starts is None else np.array(starts)
        self.eos_token_id = EOS if starts is None else None

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        assert start >= 0 and start + count <= self.num_tokens
        return self._tokens[start : start + count]

    def targets(self, start: int, count: int) -> NDArray[np.bool_] | None:
        return None if self._targets is None else self._targets[start : start + count]

    def second_start(self, start: int, count: int) -> int | None:
        return None


def test_a_row_of_three_documents() -> None:
    row = row_of(np.arange(7), starts=np.array([0, 2, 6]), targets=None, document_mask=True)
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert row.targets.tolist() == [False, True, False, True, True, True, False]
    whole = row_of(np.arange(7), starts=np.array([0, 2, 6]), targets=None, document_mask=False)
    assert whole.positions.tolist() == list(range(7))
    assert whole.targets.tolist() == [False] + [True] * 6


def test_what_the_loss_does_not_count_stays_so_and_borders_never_count() -> None:
    targets = np.array([True, False, True, True, False])
    row = row_of(np.arange(5), starts=np.array([0, 2]), targets=targets, document_mask=True)
    assert row.targets.tolist() == [False, False, False, True, False]
    assert targets.all(where=[True, False, True, True, False])  # the source's own array is left alone


def test_windows_overlap_by_one_token_and_end_with_what_is_left() -> None:
    source = Tokens([1, 2, EOS, 3, 4, 5, EOS, 6, 7, 8])
    windows = Windows(source, context_tokens=4, document_mask=True)
    assert windows.num_samples == 2
    assert [windows.row(index).tokens.tolist() for index in range(2)] == [[1, 2, EOS, 3, 4], [4, 5, EOS, 6, 7]]
    assert windows.row(2).tokens.tolist() == [7, 8]
    assert windows.row(3) is EMPTY
    assert windows.row(0).positions.tolist() == [0, 1, 2, 0, 1]
    assert windows.row(1).targets.tolist() == [False, True, True, False, True]


def test_windows_take_borders_from_starts_where_there_are_any() -> None:
    tokens = [1, 2, EOS, 3, 4, 5, EOS, 6, 7, 8]
    by_eos = Windows(Tokens(tokens), context_tokens=4, document_mask=True)
    by_starts = Windows(Tokens(tokens, starts=[0, 3, 7]), context_tokens=4, document_mask=True)
    for index in range(3):
        assert by_eos.row(index).positions.tolist() == by_starts.row(index).positions.tolist()
        assert by_eos.row(index).targets.tolist() == by_starts.row(index).targets.tolist()


def test_packs_hold_whole_documents_and_count_what_the_source_counts() -> None:
    source = Tokens([1, 2, 3, 4, 5, 6, 7], starts=[0, 3], targets=[0, 1, 1, 0, 0, 1, 1])
    plan = best_fit(np.array([0, 3]), num_tokens=7, context_tokens=6, long_documents="split")
    packs = Packs(source, plan, document_mask=True)
    assert packs.num_samples == 1
    row = packs.row(0)
    assert sorted(row.tokens.tolist()) == [1, 2, 3, 4, 5, 6, 7]
    counted = {token for token, target in zip(row.tokens.tolist(), row.targets.tolist(), strict=True) if target}
    assert counted == {2, 3, 6, 7}
    assert row.positions.tolist().count(0) == 2
    assert packs.row(1) is EMPTY
