"""Attention over packed documents without a mask: the work of the documents, not of the square of the row.

transformers hands what a backbone is called with on to the attention function, in all families here (5.17 and 5.23):
so `documents` and `chunks` reach `varlen_attention`, and no mask is built, because none is registered under its name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# Where segments of tokens [B*T] begin and end, int32 [num_segments + 1] from 0 to B*T; and a tensor without content
# whose first size is the longest one's length, which a compiled block takes as a variable and an int as a constant.
Segments = tuple[torch.Tensor, torch.Tensor]

_NAME = "hypershard_varlen"
# torch 2.11 has no such argument and wants as many key and value heads as query heads.
_KERNEL_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def register_varlen() -> str:
    """Make transformers know `varlen_attention`; returns the name to ask for it by."""
    AttentionInterface.register(_NAME, varlen_attention)
    return _NAME


def attend_in_chunks(attention: nn.Module) -> None:
    """Let this attention module see `chunks` instead of `documents`."""
    attention.attends_in_chunks = True  # type: ignore[assignment]


def varlen_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment: what transformers calls in each layer.

    query [B, heads, T, D], key and value [B, key/value heads, T, D]; returns [B, T, heads, D]. Of `options` it reads
    `documents` and `chunks` (Segments), `scaling`, and `sliding_window` in tokens, one's own included. A CUDA device
    needs bfloat16 or float16 and runs the flash kernel; the CPU goes from segment to segment.
    """
    segments: Segments | None = options["chunks" if getattr(module, "attends_in_chunks", False) else "documents"]
    assert segments is not None and attention_mask is None and not options.get("dropout"), "see train/attention.py"
    batch_size, _, context_tokens, _ = query.shape
    # Heads lie side by side in memory, so [B, heads, T, D] -> [B*T, heads, D] copies nothing.
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    window = options.get("sliding_window")
    if window is not None and window >= context_tokens:
        window = None
    attend = _by_kernel if query.is_cuda else _one_by_one
    mixed = attend(query, key, value, segments, scale=options["scaling"], window=window)
    return mixed.unflatten(0, (batch_size, context_tokens)), None


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, *, scale: float, window: int | None
) -> torch.Tensor:
    """All segments in one launch; tokens [B*T, heads, D]."""
    borders, longest = segments[0], segments[1].shape[0]
    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and _KERNEL_TAKES_GQA:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # (-1, 0) is what the kernel takes for causal: as far back as the segment goes, nothing ahead.
    back = -1 if window is None else window - 1
    mixed = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scale, window_size=(back, 0), **options
    )
    assert isinstance(mixed, torch.Tensor)  # a tuple only where the sums are asked for as well
    return mixed


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, *, scale: float, window: int | None
) -> torch.Tensor:
    """The same on the CPU, where no kernel takes segments; how many there are changes, so it is not compiled."""
    groups = query.shape[1] // key.shape[1]
    lengths = segments[0].diff().tolist()
    by_head = (query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
    parts = zip(*(states.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for states in by_head), strict=True)
    mixed = [
        F.scaled_dot_product_attention(asked, keys, values, scale=scale, **_mask(asked.shape[2], window))
        for asked, keys, values in parts
    ]
    return torch.cat(mixed, dim=2).squeeze(0).transpose(0, 1)


def _mask(num_tokens: int, window: int | None) -> dict[str, Any]:
    """Causal, and with a window shorter than the segment no further back than `window` - 1 tokens."""
    if window is None or window >= num_tokens:
        return {"is_causal": True}
    whole = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    return {"attn_mask": whole.tril() & whole.triu(1 - window)}
