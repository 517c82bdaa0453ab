"""Attention as a GPU runs it, on fake tensors of the CPU: the operations that CUDA would choose, and their workspaces.

Called on CPU tensors, torch and our own code choose other operations, which keep and copy more. An operation of a GPU
answers fake tensors all the same, because only its shapes are asked for: what it returns and what autograd saves of it
are then those of the GPU, and selective checkpointing meets the names that it knows.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

from ..models import attention_modules
from .tape import Workspaces

_ROW_MULTIPLE = 128  # the flash kernel rounds the rows of its workspaces up to this


@contextlib.contextmanager
def as_on_a_gpu(*, packs_documents: bool) -> Iterator[None]:
    """Inside, attention goes the way it goes on CUDA. `packs_documents`: rows hold several, which takes a mask where
    attention is dense; whether they do is read from the positions in a training, and fake ones cannot be read."""
    masking = importlib.import_module("transformers.masking_utils")
    patches: list[Any] = [
        mock.patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention),
        mock.patch.object(attention_modules, "_one_by_one", attention_modules._by_kernel),
    ]
    if not packs_documents:
        patches.append(mock.patch.object(masking, "find_packed_sequence_indices", lambda positions: None))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def scaled_dot_product_attention(  # noqa: PLR0917 - as torch has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """torch's own, with the kernel that CUDA takes: flash without a mask in half precision, else the memory-efficient
    one, which cannot share key heads: then the products themselves, with all their scores."""
    scale, shares_heads = options.get("scale"), options.get("enable_gqa", False)
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if shares_heads and query.shape[1] != key.shape[1]:
        math_only = torch.ops.aten._scaled_dot_product_attention_math.default
        return math_only(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)  # as CUDA makes it, in each layer anew
            attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def workspaces() -> Workspaces:
    """What CUDA's kernels allocate for themselves while they run, in bytes, by operation."""
    aten, ours = torch.ops.aten, torch.ops.torch_attn
    return {
        aten.logsumexp.default: lambda values, *_, **__: values.nbytes,  # the exponentials before they are summed
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_bytes,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward_bytes,
        ours._varlen_attn_backward.default: _varlen_backward_bytes,
    }


def _flash_backward_bytes(grad: Any, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """[B, heads, T, D]: flash_api.cpp's dq_accum and softmax_d in float32, and keys' gradients once per query head."""
    batch, heads, tokens, width = query.shape
    rows = -(-tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return _backward_bytes(query, batch * rows, heads, width, shares_heads=key.shape[1] != heads)


def _varlen_backward_bytes(grad: Any, query: torch.Tensor, key: torch.Tensor, *others: Any, **_: Any) -> int:
    """[tokens, heads, D]; the kernel leaves room for 128 rows more of each segment."""
    borders: torch.Tensor = others[3]
    tokens, heads, width = query.shape
    rows = tokens + _ROW_MULTIPLE * (borders.shape[0] - 1)
    return _backward_bytes(query, rows, heads, width, shares_heads=key.shape[1] != heads)


def _backward_bytes(query: torch.Tensor, rows: int, heads: int, width: int, *, shares_heads: bool) -> int:
    padded = -(-width // 32) * 32
    expanded = 2 * query.nbytes if shares_heads else 0
    return 4 * rows * heads * (padded + 1) + expanded


def _efficient_backward_bytes(grad: Any, query: torch.Tensor, *_: Any, **__: Any) -> int:
    """The gradient of the queries summed in float32 (where they are of less), and a number per row."""
    rows = query.numel() // query.shape[-1]
    return (4 * query.numel() if query.dtype != torch.float32 else 0) + 4 * rows
