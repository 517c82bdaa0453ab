"""Modules that multiply by frozen weights in NF4: subclasses put in place by a module's class (nf4_weights.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from ..models.moe_modules import GroupedLlama4Experts, GroupedMixtralExperts
from .lora_modules import LoraConv1D, LoraLinear, LoraLlama4Experts, LoraMixtralExperts
from .nf4_ops import nf4_grouped_mm, nf4_linear
from .nf4_weights import Held


class _Nf4Weight(nn.Module):
    """In front of a class that multiplies by its `weight`, and adds its `bias`; this one's is not read."""

    nf4_held: dict[str, Held]
    weight_codes: nn.Parameter
    weight_scales: nn.Parameter
    bias: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in] -> [.., out]."""
        held = self.nf4_held["weight"]
        return nf4_linear(
            x, self.weight_codes, self.weight_scales, self.bias, held.layout, inputs_first=held.inputs_first
        )


class Nf4Linear(_Nf4Weight, nn.Linear):
    pass


class Nf4Conv1D(_Nf4Weight, Conv1D):  # type: ignore[misc]
    pass


class _Nf4Experts(nn.Module):
    """The same for experts."""

    nf4_held: dict[str, Held]

    def multiply(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, [N, in] -> [N, out], times the weight `name`."""
        held = self.nf4_held[name]
        codes, scales = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")
        return nf4_grouped_mm(rows, ends, codes, scales, held.layout, inputs_first=held.inputs_first)


class Nf4MixtralExperts(_Nf4Experts, GroupedMixtralExperts):
    pass


class Nf4Llama4Experts(_Nf4Experts, GroupedLlama4Experts):
    pass


# With adapters: LoRA's computation around NF4's, by the order of their bases.


class LoraNf4Linear(LoraLinear, Nf4Linear):
    pass


class LoraNf4Conv1D(LoraConv1D, Nf4Conv1D):
    pass


class LoraNf4MixtralExperts(LoraMixtralExperts, Nf4MixtralExperts):
    pass


class LoraNf4Llama4Experts(LoraLlama4Experts, Nf4Llama4Experts):
    pass


IN_NF4: dict[type[nn.Module], Any] = {
    nn.Linear: Nf4Linear,
    Conv1D: Nf4Conv1D,
    MixtralExperts: Nf4MixtralExperts,
    GroupedLlama4Experts: Nf4Llama4Experts,
    LoraLinear: LoraNf4Linear,
    LoraConv1D: LoraNf4Conv1D,
    LoraMixtralExperts: LoraNf4MixtralExperts,
    LoraLlama4Experts: LoraNf4Llama4Experts,
}
"""Class of a module -> the one it has with its weights in NF4."""
