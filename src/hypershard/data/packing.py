"""A row of tokens -> what one forward pass needs, with the document boundaries kept.

Sample i of a split with context T is its tokens [i*T, i*T + T]: T + 1 of them, the last shared with the next
sample, where it is the first input. So N = (num_tokens - 1) // T samples, each token a target once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What cross_entropy leaves out by default.
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a micro-step: torch.int64 [B, T] on the CPU."""

    input_ids: Tensor
    labels: Tensor  # the token that follows each input; IGNORED_LABEL where none of the same document does
    position_ids: Tensor  # from 0 in each document (or in each sequence, without document_mask)

    @property
    def num_valid_tokens(self) -> int:
        """Labels that count: what a sum of losses is divided by, over all ranks and micro-steps."""
        return int((self.labels != IGNORED_LABEL).sum())


def num_samples(num_tokens: int, context_tokens: int) -> int:
    """Whole samples in a split; 0 when it is shorter than context_tokens + 1."""
    return max(0, num_tokens - 1) // context_tokens


def pack(windows: Tensor, *, eos_token_id: int | None, document_mask: bool) -> Batch:
    """Split windows int64 [B, T+1] into inputs, labels and positions [B, T].

    With `document_mask` positions restart at 0 after each end-of-document token (which belongs to the document
    it ends) and nothing is predicted from it; that needs `eos_token_id`. Without, each window is one document.
    """
    assert windows.ndim == 2 and windows.dtype == torch.int64, (windows.shape, windows.dtype)
    input_ids, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    places_bt = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    if not document_mask:
        return Batch(input_ids=input_ids, labels=labels, position_ids=places_bt.contiguous())
    assert eos_token_id is not None, "document_mask needs to know where documents end"
    ends_bt = input_ids == eos_token_id
    labels = labels.masked_fill(ends_bt, IGNORED_LABEL)
    # The place of the latest document's first token: the running maximum of the places right after an end.
    starts_bt = torch.zeros_like(input_ids)
    starts_bt[:, 1:] = places_bt[:, 1:] * ends_bt[:, :-1]
    return Batch(input_ids=input_ids, labels=labels, position_ids=places_bt - starts_bt.cummax(dim=1).values)
