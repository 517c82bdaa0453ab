"""Adapters put into a model, and whose weights they stand beside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..config.schema import AdapterConfig
from ..distributed.collectives import sum_over_ranks
from ..distributed.mesh import local_part
from .targets import Target, scale_of

_BLOCK_NUMEL = 2**26


def add_adapters(
    hf_model: nn.Module, targets: Sequence[Target], *, adapters: AdapterConfig, frozen_dtype: torch.dtype
) -> None:
    """Freeze `hf_model`, keep its weights in `frozen_dtype`, and put float32 adapters beside `targets`; in place.

    Every parameter is on the meta device and stays there. What was a parameter keeps its name and its ties.
    """
    from .lora_modules import ADAPTED

    for parameter in hf_model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(frozen_dtype)
    for target in targets:
        for spec in (target.a, target.b):
            owner, _, name = spec.name.rpartition(".")
            module = hf_model.get_submodule(owner)
            if type(module) not in ADAPTED.values():
                module.__class__ = ADAPTED[type(module)]
                module.lora_scale, module.lora_dropout = scale_of(adapters), adapters.lora_dropout  # type: ignore[assignment]
            module.register_parameter(name, nn.Parameter(torch.empty(spec.shape, device="meta", dtype=torch.float32)))


@contextlib.contextmanager
def without_adapters(hf_model: nn.Module) -> Iterator[None]:
    """Let `hf_model` compute as if it had none."""
    from .lora_modules import ADAPTED

    adapted = [module for module in hf_model.modules() if isinstance(module, tuple(ADAPTED.values()))]
    for module in adapted:
        module.lora_is_on = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in adapted:
            module.lora_is_on = True  # type: ignore[assignment]


@torch.no_grad()
def bit_sums(weights: Sequence[Sequence[torch.Tensor]], *, num_replicas: int, device: torch.device) -> tuple[int, ...]:
    """One number for each of `weights`, equal for equal values, however they are spread. Collective.

    They tell a model's weights from another's. Each is held in one parameter or, packed, in several; `num_replicas`
    ranks hold the same part.
    """
    sums = [torch.stack([bit_sum(local_part(part)[0]) for part in parts]).sum() for parts in weights]
    # Whole numbers below 2**53, so float64 adds them exactly in any order.
    return tuple(round(total / num_replicas) for total in sum_over_ranks(sums, device=device).tolist())


def bit_sum(weight: torch.Tensor) -> torch.Tensor:
    """The sum of a weight's bfloat16 bit patterns as 16-bit numbers, int64 scalar; the same for the float32 weight.

    Of packed bytes (nf4_ops.py) the sum of these. Row by row in blocks, because the patterns are a copy.
    """
    blocks = weight.flatten().split(_BLOCK_NUMEL)
    sums = [block.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64) for block in blocks]
    return torch.stack(sums).sum()
