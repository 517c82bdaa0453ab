"""The few things ranks tell each other outside FSDP2's own communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def sum_over_ranks(values: Sequence[float | torch.Tensor], *, device: torch.device) -> torch.Tensor:
    """Sum each of `values` over all ranks in one collective.

    Returns float64 [len(values)] on `device`, the same bits on every rank. Scalars may be numbers or 0-d tensors.
    """
    vector = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if dist.get_world_size() > 1:
        dist.all_reduce(vector)
    return vector


def from_main(value: Any) -> Any:
    """Rank 0's `value` on every rank (a decision, a listing). Peers of one job trust each other."""
    if dist.get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait for all ranks, on the host."""
    if dist.get_world_size() > 1:
        dist.barrier()
