"""Rows -> what one forward pass needs, with the document boundaries kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .rows import Row

# What cross_entropy leaves out by default.
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a micro-step: torch.int64 [B, T] on the CPU."""

    input_ids: Tensor
    labels: Tensor  # the token that follows each input; IGNORED_LABEL where the loss does not count it
    position_ids: Tensor  # from 0 in each document (or in each sequence, without document_mask)
    num_padding_tokens: int = 0  # inputs that only fill up rows

    @property
    def num_valid_tokens(self) -> int:
        """Labels that count: what a sum of losses is divided by, over all ranks and micro-steps."""
        return int((self.labels != IGNORED_LABEL).sum())

    def pinned(self) -> Batch:
        """The same in pinned memory, from which a GPU copies beside its work."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
        )


def batch_of(rows: Sequence[Row], *, context_tokens: int) -> Batch:
    """`rows` [B] as a batch [B, context_tokens]; a row that is shorter is filled up with one document of padding."""
    shape = (len(rows), context_tokens)
    input_ids, labels, position_ids = (np.empty(shape, dtype=np.int64) for _ in range(3))
    num_padding = 0
    for number, row in enumerate(rows):
        size, num_labels = min(len(row.tokens), context_tokens), max(0, len(row.tokens) - 1)
        input_ids[number, :size] = row.tokens[:size]
        position_ids[number, :size] = row.positions[:size]
        labels[number, :num_labels] = row.tokens[1:]
        labels[number, :num_labels][~row.targets[1:]] = IGNORED_LABEL
        labels[number, num_labels:] = IGNORED_LABEL
        if size < context_tokens:
            input_ids[number, size:] = 0
            position_ids[number, size:] = np.arange(context_tokens - size)
            num_padding += context_tokens - size
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        num_padding_tokens=num_padding,
    )
