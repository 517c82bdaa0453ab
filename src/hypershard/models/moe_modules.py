"""Mixture-of-experts blocks that replace transformers' own, and the loss that keeps experts evenly used.

The blocks are subclasses put in place by changing a module's class: parameters, their names and the
surrounding model stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock


class BalancedMixtralMoe(MixtralSparseMoeBlock):  # type: ignore[misc]
    """transformers' Mixtral block with the balance loss."""

    router_loss_scale = 0.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, experts = self.gate(tokens)
        mixed = self.experts(tokens, experts, weights).view_as(hidden_states)
        return with_router_loss(self, mixed, logits, experts, batch_size=hidden_states.shape[0])


class GroupedLlama4Moe(Llama4TextMoe):  # type: ignore[misc]
    """Llama 4's block with each token sent to its experts alone.

    transformers' own multiplies every token with every expert, the unchosen ones by zero: 16 times the work.
    """

    router_loss_scale = 0.0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, H] -> ([B*T, H], router logits [B*T, num_experts]), as transformers' block."""
        batch_size = hidden_states.shape[0]
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)  # the scores of unchosen experts are 0
        experts = torch.topk(logits, self.top_k, dim=1).indices
        mixed = self.shared_expert(tokens) + self._routed(tokens, scores.gather(1, experts), experts)
        return with_router_loss(self, mixed, logits, experts, batch_size=batch_size), logits

    def _routed(self, tokens: torch.Tensor, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """tokens [N, H], scores and experts [N, k] -> sum over each token's experts [N, H]."""
        order, ends = sort_by_expert(experts, self.num_experts)
        # index_select, whose backward adds rows; that of tokens[...] sorts them first.
        rows = tokens.index_select(0, order // self.top_k)
        rows = rows * scores.flatten().index_select(0, order).unsqueeze(1)  # inputs are scaled, not outputs
        gate, up = self.experts.multiply("gate_up_proj", rows, ends).chunk(2, dim=-1)
        rows = self.experts.multiply("down_proj", up * self.experts.act_fn(gate), ends)
        return rows.index_select(0, order.argsort()).view(-1, self.top_k, self.hidden_dim).sum(1)


class GroupedLlama4Experts(Llama4TextExperts):  # type: ignore[misc]
    """Llama 4's experts, [num_experts, in, out], as GroupedLlama4Moe calls them."""

    def multiply(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, [N, in] -> [N, out], times the weight `name`."""
        return grouped_mm(rows, getattr(self, name), ends)


class GroupedMixtralExperts(MixtralExperts):  # type: ignore[misc]
    """Mixtral's experts, [num_experts, out, in], whose `multiply` can be overridden; transformers' cannot.

    The same operations as transformers' `grouped_mm` experts, so the same bits.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [N, H], top_k_index and top_k_weights [N, k] -> [N, H]."""
        num_chosen = top_k_index.shape[-1]
        order, ends = sort_by_expert(top_k_index, self.num_experts)
        rows = hidden_states.index_select(0, order // num_chosen)
        rows = self.multiply("down_proj", self._apply_gate(self.multiply("gate_up_proj", rows, ends)), ends)
        rows = rows * top_k_weights.flatten().index_select(0, order).unsqueeze(1)
        mixed = rows.index_select(0, order.argsort()).view(-1, num_chosen, rows.shape[-1]).sum(1)
        return mixed.to(hidden_states.dtype)

    def multiply(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, [N, in] -> [N, out], times the weight `name`."""
        return grouped_mm(rows, getattr(self, name).transpose(-2, -1), ends)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """experts [N, k] -> the order that puts its N*k assignments one expert after another, and where each one's end.

    The order is int64 [N*k], the ends int32 [num_experts].
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    ends = (flat.unsqueeze(1) == torch.arange(num_experts, device=flat.device)).sum(0).cumsum(0)
    return order, ends.to(torch.int32)


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to ends[0] times weight[0], the next up to ends[1] times weight[1], and so on.

    rows [N, in], sorted by expert; weight [num_experts, in, out]; ends int32 [num_experts], the last one N.
    """
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return _grouped_mm_uncompiled(rows, weight, ends)  # inductor knows it in bfloat16 only
    return F.grouped_mm(rows, weight, offs=ends)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grouped_mm_uncompiled(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, weight, offs=ends)


# --- the balance loss


class AddLossGradient(torch.autograd.Function):
    """Identity on `values` whose backward also sends the gradient `scale` into `loss`.

    A loss thus takes part in backward without being an output of the model: it needs no place to wait in, so
    it goes through activation checkpointing, compile and sharding like any other operation.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.loss_dtype = loss.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        return grad_values, grad_values.new_full((), ctx.scale, dtype=ctx.loss_dtype), None


def balance_losses(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """How unevenly each sequence uses the experts: 1 when even, up to num_experts when all tokens meet at one.

    Switch Transformer's loss (arXiv 2101.03961, equations 4 to 6), num_experts x sum over e of f_e P_e, taken
    over one sequence: f_e is the share of its assignments that went to expert e (no gradient), P_e the mean
    router probability (softmax of the logits). Over one sequence and not over a batch, so that the value does
    not depend on which sequences share a micro-step or a rank.
    logits [B, T, num_experts], experts int64 [B, T, k]; returns float32 [B].
    """
    num_experts = logits.shape[-1]
    chosen = experts.flatten(1)
    counts = torch.zeros(chosen.shape[0], num_experts, dtype=torch.float32, device=logits.device)
    counts = counts.scatter_add(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
    probabilities = logits.float().softmax(-1).mean(1)
    return num_experts * (counts / chosen.shape[1] * probabilities).sum(-1)


def with_router_loss(
    block: Any, values: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, *, batch_size: int
) -> torch.Tensor:
    """`values` as they are; in training, backward through them adds the gradient of the block's balance losses.

    logits [B*T, num_experts], experts [B*T, k].
    """
    if not (block.training and block.router_loss_scale and torch.is_grad_enabled()):
        return values
    losses = balance_losses(logits.unflatten(0, (batch_size, -1)), experts.unflatten(0, (batch_size, -1)))
    added: torch.Tensor = AddLossGradient.apply(values, losses.sum(), block.router_loss_scale)
    return added


# --- put in place


def balance_mixtral(hf_model: nn.Module) -> None:
    """Replace Mixtral's blocks by ours, in place."""
    _change_class(hf_model, MixtralSparseMoeBlock, BalancedMixtralMoe)


def group_llama4(hf_model: nn.Module) -> None:
    """Replace Llama 4's blocks by ours, in place."""
    _change_class(hf_model, Llama4TextMoe, GroupedLlama4Moe)
    _change_class(hf_model, Llama4TextExperts, GroupedLlama4Experts)


def _change_class(hf_model: nn.Module, old: type, new: type) -> None:
    found = [module for module in hf_model.modules() if type(module) is old]
    assert found, f"the model has no {old.__name__}"
    for module in found:
        module.__class__ = new


def set_router_loss(hf_model: nn.Module, *, scale_of_one_sequence: float) -> None:
    """Switch the balance loss on: one sequence adds `scale_of_one_sequence` x its mean over the layers."""
    blocks = [module for module in hf_model.modules() if isinstance(module, BalancedMixtralMoe | GroupedLlama4Moe)]
    for block in blocks:
        block.router_loss_scale = scale_of_one_sequence / len(blocks)
