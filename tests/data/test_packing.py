"""Rows as a batch: labels are the next tokens, what does not count is ignored, short rows are filled up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rows import EOS, Tokens

from hypershard.data.packing import IGNORED_LABEL, batch_of
from hypershard.data.rows import EMPTY, Row, Windows


def rows_of(tokens: list[int], *, context_tokens: int, document_mask: bool = True) -> list[Row]:
    windows = Windows(Tokens(tokens), context_tokens=context_tokens, document_mask=document_mask)
    return [windows.row(index) for index in range(windows.num_samples)]


def test_documents_are_kept_apart() -> None:
    batch = batch_of(rows_of([5, 6, EOS, 7, EOS, EOS, 8, 1, EOS, 3, 4, 5, EOS], context_tokens=6), context_tokens=6)
    assert batch.input_ids.tolist() == [[5, 6, EOS, 7, EOS, EOS], [8, 1, EOS, 3, 4, 5]]
    assert batch.labels.tolist() == [[6, EOS, -100, EOS, -100, -100], [1, EOS, -100, 4, 5, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert batch.num_valid_tokens == 8
    assert batch.num_padding_tokens == 0


def test_without_document_mask_each_row_is_one_document() -> None:
    batch = batch_of(rows_of([5, EOS, 7, 8], context_tokens=3, document_mask=False), context_tokens=3)
    assert batch.labels.tolist() == [[EOS, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.num_valid_tokens == 3


def test_no_label_and_no_position_crosses_a_document() -> None:
    tokens = np.random.default_rng(0).integers(0, 6, 16 * 64 + 1)
    tokens[tokens == 5] = EOS  # one token in six ends a document
    rows = rows_of(tokens.tolist(), context_tokens=64)
    batch = batch_of(rows, context_tokens=64)
    for row in range(16):
        window = tokens[row * 64 : row * 64 + 65].tolist()
        document = place = 0
        documents = []
        for token in window:
            documents.append((document, place))
            document, place = (document + 1, 0) if token == EOS else (document, place + 1)
        for t in range(64):
            same_document = documents[t][0] == documents[t + 1][0]
            assert batch.labels[row, t] == (window[t + 1] if same_document else IGNORED_LABEL)
            assert batch.position_ids[row, t] == documents[t][1]


def test_short_and_empty_rows_are_filled_up_with_a_document_that_does_not_count() -> None:
    short = Row(tokens=np.array([5, 6, 7]), positions=np.arange(3), targets=np.array([False, True, True]))
    batch = batch_of([short, EMPTY], context_tokens=6)
    assert batch.labels.tolist() == [[6, 7, -100, -100, -100, -100], [-100] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], list(range(6))]
    assert (batch.num_valid_tokens, batch.num_padding_tokens) == (2, 9)


@pytest.mark.parametrize("document_mask", [True, False])
def test_batches_are_int64_and_contiguous(document_mask: bool) -> None:
    rows = rows_of(list(range(10, 27)), context_tokens=8, document_mask=document_mask)
    batch = batch_of(rows, context_tokens=8)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.shape == (2, 8) and tensor.dtype == torch.int64 and tensor.is_contiguous()


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_samples_share_one_token(num_tokens: int, expected: int) -> None:
    windows = Windows(Tokens(list(range(num_tokens))), context_tokens=8, document_mask=False)
    assert windows.num_samples == expected
