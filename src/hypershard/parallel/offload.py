"""Activation offload: what backward needs of forward waits in host memory.

Weights that autograd saves are left alone (FSDP2 owns them), and so are small tensors, whose transfer costs
more than their memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_SMALLEST_BYTES = 64 * 1024  # below this a transfer is all latency


def offload_activations(block: nn.Module) -> None:
    """Keep what `block` saves for backward in host memory, pinned when it comes from a GPU."""
    forward = block.forward

    @functools.wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
            return forward(*args, **kwargs)

    block.forward = offloading


def _to_host(tensor: torch.Tensor) -> Any:
    base = tensor._base if tensor._base is not None else tensor
    if isinstance(base, nn.Parameter) or tensor.nbytes < _SMALLEST_BYTES:
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=tensor.is_cuda)
    return tensor.device, host


def _to_device(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    device, host = packed
    moved: torch.Tensor = host.to(device, non_blocking=True)
    return moved
