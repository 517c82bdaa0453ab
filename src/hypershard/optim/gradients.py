"""Gradients between backward and the optimizer: their size, and bounding it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards of the gradients that exist."""
    return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]


def sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of this rank's shards, float64 scalar on their device; 0 when it holds none."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    # In float32 the sum over a large tensor is off in its sixth digit, in another way for every sharding.
    norms = torch._foreach_norm(gradients, 2, torch.float64)
    return torch.stack(norms).square().sum()


def clip(gradients: list[torch.Tensor], *, norm: float, limit: float) -> None:
    """Scale `gradients` so that their global `norm` is at most `limit`; 0 means no limit."""
    if 0 < limit < norm:
        torch._foreach_mul_(gradients, limit / norm)
