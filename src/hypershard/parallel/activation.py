"""Activation checkpointing: which results of forward are kept for backward and which are computed again.

Applied to a block's `forward`, not by a wrapper module, so parameter names stay those of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # brings its operation, named below
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Operations whose results `selective` keeps: attention, reductions over the network, and every second matrix
# product. The list and the every-second rule are torchtitan's (torchtitan/distributed/activation_checkpoint.py):
# they cost most of forward's time but little of its memory; everything between them is recomputed.
_ALWAYS_KEPT = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
)
_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)


def no_product(operation: Any, args: Any) -> bool:
    """That a model has no other products than torch's."""
    return False


def checkpoint_activations(
    block: nn.Module, mode: str, *, low_rank: int = 0, is_product: Callable[[Any, Any], bool] = no_product
) -> None:
    """Make `block` recompute in backward: everything (`full`) or all but the costly operations (`selective`).

    Matrix products over or into at most `low_rank` numbers are adapters': cheap, so they are recomputed, and not
    counted among those of which every second one is kept. `is_product` tells of an operation and its arguments whether
    it is a product with a packed weight, which counts as any other.
    """
    checkpointed = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if mode == "selective":
        checkpointed = functools.partial(
            checkpointed, context_fn=functools.partial(_selective_contexts, low_rank, is_product)
        )
    block.forward = checkpointed


def _selective_contexts(low_rank: int, is_product: Callable[[Any, Any], bool]) -> Any:
    num_products = {"forward": 0, "recompute": 0}  # counted apart: recomputation meets the same sequence again

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_dense = operation in _MATRIX_PRODUCTS and min(args[1].shape[-2:]) > low_rank
        if is_dense or is_product(operation, args):
            phase = "recompute" if context.is_recompute else "forward"
            num_products[phase] += 1
            kept = num_products[phase] % 2 == 1
        else:
            kept = operation in _ALWAYS_KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
