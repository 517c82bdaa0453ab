"""Steps -> this rank's batches. Nothing is kept between calls, so there is nothing to save or restore.

What a run resumes from is the number of samples consumed and the source's fingerprint. At position P the global
batch is the samples at [P, P + G), G = accumulation * world_size * batch_size; micro-step m of rank r holds at
item b the sample at P + (m * world_size + r) * batch_size + b.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DataError
from . import packing
from .order import SampleOrder
from .packing import IGNORED_LABEL, Batch
from .source import TokenSource


class Loader:
    """One rank's reader of one split. `num_samples`: whole sequences in it, which is an epoch."""

    def __init__(
        self,
        source: TokenSource,
        *,
        context_tokens: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        document_mask: bool,
    ):
        """DataError: `document_mask` with a source that does not know where its documents end."""
        assert 0 <= rank < world_size and context_tokens >= 1 and batch_size >= 1
        if document_mask and source.eos_token_id is None:
            raise DataError(
                "--document_mask=1: the data set's meta.json names no eos_token_id, so documents cannot be told apart; "
                "set --document_mask=0 or prepare the data again"
            )
        self.source = source
        self.num_samples = packing.num_samples(source.num_tokens, context_tokens)
        self._context_tokens = context_tokens
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._document_mask = document_mask
        self._seed = seed

    @property
    def samples_per_epoch(self) -> int:
        """`num_samples`, for training. DataError when the split is shorter than one sequence."""
        if self.num_samples < 1:
            context_tokens = self._context_tokens
            raise DataError(
                f"--dataset: found {self.source.num_tokens} tokens to train on; expected at least {context_tokens + 1} "
                f"(--max_context_width={context_tokens} and one to predict); "
                "give more text or a smaller --max_context_width"
            )
        return self.num_samples

    def step(self, first_position: int, *, accumulation: int) -> list[Batch]:
        """This rank's micro-batches of the optimizer step whose first sample is at `first_position`."""
        order = SampleOrder(self.samples_per_epoch, self._seed)
        return [
            self._batch(order.samples(self._place(first_position, micro_step), self._batch_size))
            for micro_step in range(accumulation)
        ]

    def validation(self, num_batches: int) -> Iterator[Batch]:
        """`num_batches` batches of equal shape, in the order of the file, no sequence on two ranks or twice.

        The end of the split is padded to a full sequence. Where sequences run out, ranks get batches whose labels
        are all ignored: every rank must run the same number of forward passes.
        """
        for index in range(num_batches):
            first = self._place(0, index)
            yield self._batch(np.arange(first, first + self._batch_size, dtype=np.int64))

    def _place(self, first: int, micro_step: int) -> int:
        return first + (micro_step * self._world_size + self._rank) * self._batch_size

    def _batch(self, samples: NDArray[np.int64]) -> Batch:
        """The samples [B] as a batch; what lies beyond the split is padded and ignored."""
        context_tokens = self._context_tokens
        windows = np.zeros((len(samples), context_tokens + 1), dtype=np.int64)
        num_labels = np.zeros(len(samples), dtype=np.int64)
        for row, sample in enumerate(samples.tolist()):
            start = sample * context_tokens
            num_read = min(context_tokens + 1, self.source.num_tokens - start)
            if num_read >= 2:
                windows[row, :num_read] = self.source.read(start, num_read)
                num_labels[row] = num_read - 1
        batch = packing.pack(
            torch.from_numpy(windows), eos_token_id=self.source.eos_token_id, document_mask=self._document_mask
        )
        if num_labels.min() == context_tokens:
            return batch
        beyond = torch.arange(context_tokens) >= torch.from_numpy(num_labels)[:, None]
        return Batch(
            input_ids=batch.input_ids,
            labels=batch.labels.masked_fill(beyond, IGNORED_LABEL),
            position_ids=batch.position_ids,
        )
