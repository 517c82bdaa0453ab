"""Modules that compute with adapters: subclasses put in place by a module's class, so that names stay the model's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from ..models.moe_modules import GroupedLlama4Experts, GroupedMixtralExperts, grouped_mm


class _LowRank(nn.Module):
    """x W^T + scale * dropout(x) A^T B^T, in front of a class that computes x W^T."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_dropout: float
    lora_is_on: bool = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., in] -> [.., out]."""
        if not self.lora_is_on:
            return super().forward(x)  # type: ignore[no-any-return]
        # Scaled where it is narrow.
        narrow = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A) * self.lora_scale
        whole: torch.Tensor = super().forward(x)
        return whole + F.linear(narrow, self.lora_B)


class LoraLinear(_LowRank, nn.Linear):
    pass


class LoraConv1D(_LowRank, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is [in, out]; its adapters are as everywhere."""


class _LowRankExperts(nn.Module):
    """The same for experts: each row meets the adapters of its own expert."""

    lora_scale: float
    lora_dropout: float
    lora_is_on: bool = True

    def multiply(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, [N, in] -> [N, out]."""
        whole: torch.Tensor = super().multiply(name, rows, ends)  # type: ignore[misc]
        a, b = getattr(self, f"{name}_lora_A", None), getattr(self, f"{name}_lora_B", None)
        if a is None or b is None or not self.lora_is_on:
            return whole
        rows = F.dropout(rows, self.lora_dropout, self.training)
        narrow = grouped_mm(rows, a.transpose(-2, -1), ends) * self.lora_scale
        return whole + grouped_mm(narrow, b.transpose(-2, -1), ends)


class LoraMixtralExperts(_LowRankExperts, GroupedMixtralExperts):
    pass


class LoraLlama4Experts(_LowRankExperts, GroupedLlama4Experts):
    pass


ADAPTED: dict[type[nn.Module], Any] = {
    nn.Linear: LoraLinear,
    Conv1D: LoraConv1D,
    MixtralExperts: LoraMixtralExperts,
    GroupedLlama4Experts: LoraLlama4Experts,
}
"""Class of a module -> the one it has with adapters."""
