"""How a weight lies in NF4 (nf4.py), and how many bytes it takes: arithmetic on shapes, without torch.

A weight's rows are its last dimension: those of a matrix [rows, columns], or of fused experts [experts, rows, columns],
whose (expert, row) pairs are the rows here. Each row stands alone, so any cut between rows gives each side the bits it
has in the whole, on any number of ranks:

| part | of | bytes |
|---|---|---|
| codes | two weights to a byte, the first in the upper half; the last block is filled up with zeros | 32 per block |
| scales, plain | float32 absmax of each block of 64 weights | 4 per block |
| scales, double | float32 minimum of each group of 256 absmax, then | 8 per group |
| | float32 step of each group, then a byte per absmax | and 1 per block, up to a multiple of 4 |

Bytes per weight, in columns of 4096: 0.5176 double, 0.5625 plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 64  # weights that share an absmax
GROUP = 256  # absmax that share a float32 minimum and step
MOST_UNPACKED = 2**28  # of experts' weights, dequantised at a time: 512 MiB in bfloat16, where one expert is no larger


@dataclass(frozen=True)
class Format:
    """How a weight of `shape` is held: rows of `code_bytes` and `scale_bytes`."""

    shape: tuple[int, ...]
    double_quant: bool

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_blocks(self) -> int:
        """Of one row."""
        return -(-self.shape[-1] // BLOCK)

    @property
    def code_bytes(self) -> int:
        """Of one row."""
        return self.num_blocks * BLOCK // 2

    @property
    def scale_bytes(self) -> int:
        """Of one row; a multiple of 4, so that its numbers lie where float32 may."""
        if not self.double_quant:
            return 4 * self.num_blocks
        return 8 * self.num_groups + -(-self.num_blocks // 4) * 4

    @property
    def num_groups(self) -> int:
        """Of one row."""
        return -(-self.num_blocks // GROUP)

    @property
    def num_bytes(self) -> int:
        """Of the whole weight."""
        return self.num_rows * (self.code_bytes + self.scale_bytes)

    @property
    def num_unpacked(self) -> int:
        """Weights that a product has dequantised at a time: a matrix, or as many experts as MOST_UNPACKED holds."""
        num_weights = math.prod(self.shape)
        if len(self.shape) == 2:
            return num_weights
        expert = math.prod(self.shape[1:])
        return min(num_weights, max(1, MOST_UNPACKED // expert) * expert)
