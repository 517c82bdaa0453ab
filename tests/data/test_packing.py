from __future__ import annotations

import pytest
import torch

from hypershard.data.packing import IGNORED_LABEL, num_samples, pack

EOS = 0


def test_documents_are_kept_apart():
    windows = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8], [EOS, 1, 2, 3, 4, 5, EOS]])
    batch = pack(windows, eos_token_id=EOS, document_mask=True)
    assert batch.input_ids.tolist() == [[5, 6, EOS, 7, EOS, EOS], [EOS, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[6, EOS, -100, EOS, -100, -100], [-100, 2, 3, 4, 5, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert batch.num_valid_tokens == 8


def test_without_document_mask_each_window_is_one_document():
    windows = torch.tensor([[5, EOS, 7, 8]])
    batch = pack(windows, eos_token_id=EOS, document_mask=False)
    assert batch.labels.tolist() == [[EOS, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.num_valid_tokens == 3


def test_no_label_and_no_position_crosses_a_document():
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 6, (16, 65), generator=generator)  # one token in six ends a document
    batch = pack(windows, eos_token_id=EOS, document_mask=True)
    for row in range(16):
        document = place = 0
        documents = []
        for token in windows[row].tolist():
            documents.append((document, place))
            document, place = (document + 1, 0) if token == EOS else (document, place + 1)
        for t in range(64):
            same_document = documents[t][0] == documents[t + 1][0]
            assert batch.labels[row, t] == (windows[row, t + 1] if same_document else IGNORED_LABEL)
            assert batch.position_ids[row, t] == documents[t][1]


@pytest.mark.parametrize("document_mask", [True, False])
def test_batches_are_int64_and_contiguous(document_mask):
    batch = pack(torch.arange(1, 19).reshape(2, 9), eos_token_id=EOS, document_mask=document_mask)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert tensor.shape == (2, 8) and tensor.dtype == torch.int64 and tensor.is_contiguous()


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_samples_share_one_token(num_tokens, expected):
    assert num_samples(num_tokens, 8) == expected
