"""The order of samples: a pure function of (seed, position), the same for any number of ranks.

A position counts samples since the start of training. Position p lies in epoch p // N at place p % N, and each
epoch is a keyed permutation of [0, N): a Feistel network over the next even power of two, walked on until it
lands below N (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So any part of any epoch is
found at once, without a table of N entries, and resuming needs one number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# 4 rounds make a good permutation of a large domain; small domains have few bits per half and need more.
NUM_ROUNDS = 8
_MASK64 = 2**64 - 1
# A step wants a few positions, and working out one or a thousand takes nearly the same time.
_BLOCK = 1024
_BLOCKS_KEPT = 4


class SampleOrder:
    """Order of `num_samples` samples, shuffled anew in each epoch by `seed`."""

    def __init__(self, num_samples: int, seed: int):
        assert num_samples >= 1, num_samples
        self.num_samples = num_samples
        self._seed = seed
        self._blocks: dict[int, NDArray[np.int64]] = {}
        # Two halves of equal width whose domain, 4**half_bits, is the smallest that holds num_samples.
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def samples(self, first_position: int, count: int) -> NDArray[np.int64]:
        """Sample indices [count] at positions first_position, first_position + 1, …; time and memory O(count)."""
        return self._work_out(np.arange(first_position, first_position + count, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices [n] at `positions` [n], for callers that come back for positions nearby."""
        samples = np.empty(len(positions), dtype=np.int64)
        blocks, places = np.divmod(positions, _BLOCK)
        for block in np.unique(blocks).tolist():
            if block not in self._blocks:
                if len(self._blocks) == _BLOCKS_KEPT:
                    del self._blocks[next(iter(self._blocks))]
                self._blocks[block] = self.samples(block * _BLOCK, _BLOCK)
            here = blocks == block
            samples[here] = self._blocks[block][places[here]]
        return samples

    def _work_out(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices [n] at `positions` [n], which may lie in several epochs."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = self._permuted(epoch, places[here].astype(np.uint64))
        return samples

    def _permuted(self, epoch: int, places: NDArray[np.uint64]) -> NDArray[np.int64]:
        keys = _round_keys(self._seed, epoch)
        values = self._feistel(places, keys)
        # The domain is below 4 N, so a value needs fewer than four walks on average.
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._feistel(values[outside], keys)
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64], keys: list[np.uint64]) -> NDArray[np.uint64]:
        half_bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half_bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half_bits) | right


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    state = np.array([seed & _MASK64], dtype=np.uint64)
    for word in (seed >> 64 & _MASK64, epoch):
        state = _mix(state + np.uint64(word))
    rounds = np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64)
    return list(_mix(state + rounds * np.uint64(0x9E3779B97F4A7C15)))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): each input bit flips about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
