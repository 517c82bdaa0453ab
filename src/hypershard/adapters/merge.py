"""Weights with their adapters worked in: W + scale * B A, summed in float32, rounded once to W's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .targets import Target


def merge_box(
    weight: torch.Tensor, target: Target, a: torch.Tensor, b: torch.Tensor, *, scale: float, offsets: Sequence[int]
) -> torch.Tensor:
    """`weight`, the box of the target's weight that starts at `offsets`, with the adapters' part of that box added.

    a and b are the target's whole matrices, float32. One expert after another, so that no float32 copy of more is held.
    """
    if weight.ndim > 2:
        experts = range(offsets[0], offsets[0] + weight.shape[0])
        merged = torch.empty_like(weight)
        for index, expert in enumerate(experts):
            merged[index] = _merge_matrix(weight[index], target, a[expert], b[expert], scale, offsets[1:])
        return merged
    return _merge_matrix(weight, target, a, b, scale, offsets)


def _merge_matrix(  # noqa: PLR0917 - the box, and what is added to it
    weight: torch.Tensor, target: Target, a: torch.Tensor, b: torch.Tensor, scale: float, offsets: Sequence[int]
) -> torch.Tensor:
    left, right = (a.t(), b.t()) if target.matrix.inputs_first else (b, a)
    rows = slice(offsets[0], offsets[0] + weight.shape[0])
    columns = slice(offsets[1], offsets[1] + weight.shape[1])
    return torch.addmm(weight.float(), left[rows].float(), right[:, columns].float(), alpha=scale).to(weight.dtype)
