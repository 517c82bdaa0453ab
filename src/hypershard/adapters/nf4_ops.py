"""Matrix products with weights in NF4: dequantised for the product and forgotten.

They are operations of their own, not functions that autograd and the compiler look into, for what is kept until
backward: of the weight only its packed parameters, which FSDP2 gathers again. Seen in parts, the dequantised weight,
the same in forward and backward, is what a compiler would compute once and keep.

Weights come as `nf4_modules` makes them, parameters of bfloat16 that hold bytes: FSDP2 of torch 2.11 takes no parameter
that cannot have a gradient, and casts all others to its param_dtype; bfloat16 is what it leaves alone, with
MixedPrecisionPolicy(param_dtype=bfloat16) and without. Nothing else may cast them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .nf4 import Quantised, dequantise, quantise
from .nf4_format import MOST_UNPACKED, Format


def packed(part: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [rows, n] as the bfloat16 [rows, n / 2] that parameters hold; the same memory."""
    return part.view(torch.bfloat16)


def packed_parts(weight: torch.Tensor, *, double_quant: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` quantised: the codes and the scales that its two parameters hold."""
    parts = quantise(weight, double_quant=double_quant)
    return packed(parts.codes), packed(parts.scales)


def unpacked(codes: torch.Tensor, scales: torch.Tensor) -> Quantised:
    """What the two parameters (or local parts of them) hold; the same memory."""
    assert codes.dtype == scales.dtype == torch.bfloat16, f"bytes were cast to {codes.dtype}, {scales.dtype}"
    return Quantised(codes.view(torch.uint8), scales.view(torch.uint8))


@torch.library.custom_op("hypershard::nf4_linear", mutates_args=())
def _linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    shape: list[int],
    double_quant: bool,
    inputs_first: bool,
) -> torch.Tensor:
    weight = dequantise(unpacked(codes, scales), Format(tuple(shape), double_quant), dtype=rows.dtype)
    return F.linear(rows, weight.t() if inputs_first else weight, bias)


@_linear.register_fake
def _(rows: Any, codes: Any, scales: Any, bias: Any, *, shape: Any, double_quant: Any, inputs_first: Any) -> Any:
    return rows.new_empty(*rows.shape[:-1], shape[1] if inputs_first else shape[0])


def _linear_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _, codes, scales, bias = inputs
    assert bias is None or not bias.requires_grad, "the bias of a frozen weight is frozen"
    ctx.held = keyword_only_inputs
    ctx.save_for_backward(codes, scales)


def _linear_backward(ctx: Any, gradient: torch.Tensor) -> Any:
    # The product with the transposed weight is the same operation.
    turned = {**ctx.held, "inputs_first": not ctx.held["inputs_first"]}
    return _linear(gradient, *ctx.saved_tensors, None, **turned), None, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_context)


def nf4_linear(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Format,
    *,
    inputs_first: bool,
) -> torch.Tensor:
    """As F.linear, [.., in] -> [.., out], in the type of `rows`; the weight is [out, in] or, inputs first, [in, out].

    `codes` and `scales` are the parameters that hold a weight of `layout`; a gradient flows to `rows` alone.
    """
    held = {"shape": list(layout.shape), "double_quant": layout.double_quant, "inputs_first": inputs_first}
    return _linear(rows, codes, scales, bias, **held)


@torch.library.custom_op("hypershard::nf4_grouped_mm", mutates_args=())
def _grouped(
    rows: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    shape: list[int],
    double_quant: bool,
    inputs_first: bool,
) -> torch.Tensor:
    layout = Format(tuple(shape), double_quant)
    return grouped_product(
        rows, ends, unpacked(codes, scales), layout, inputs_first=inputs_first, most_weights=MOST_UNPACKED
    )


def grouped_product(
    rows: torch.Tensor,
    ends: torch.Tensor,
    quantised: Quantised,
    layout: Format,
    *,
    inputs_first: bool,
    most_weights: int,
) -> torch.Tensor:
    """See `nf4_grouped_mm`. As many experts are dequantised at a time as have `most_weights`; at least one.

    One pass over all experts needs no number of rows on the host; several do, and skip experts without rows.
    """
    num_experts, expert_rows, columns = layout.shape
    step = max(1, most_weights // (expert_rows * columns))

    def product(part: torch.Tensor, start: int, stop: int, part_ends: torch.Tensor) -> torch.Tensor:
        own = quantised.rows(start * expert_rows, stop * expert_rows)
        weight = dequantise(own, layout, dtype=rows.dtype).unflatten(0, (stop - start, expert_rows)).contiguous()
        return F.grouped_mm(part, weight if inputs_first else weight.mT, offs=part_ends)

    if step >= num_experts:
        return product(rows, 0, num_experts, ends)
    out = rows.new_zeros(rows.shape[0], columns if inputs_first else expert_rows)
    borders = [0, *ends.tolist()]
    for start in range(0, num_experts, step):
        stop = min(start + step, num_experts)
        first, end = borders[start], borders[stop]
        if end > first:
            out[first:end] = product(rows[first:end], start, stop, ends[start:stop] - first)
    return out


@_grouped.register_fake
def _(rows: Any, ends: Any, codes: Any, scales: Any, *, shape: Any, double_quant: Any, inputs_first: Any) -> Any:
    return rows.new_empty(rows.shape[0], shape[2] if inputs_first else shape[1])


def _grouped_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.held = keyword_only_inputs
    ctx.save_for_backward(*inputs[1:])


def _grouped_backward(ctx: Any, gradient: torch.Tensor) -> Any:
    turned = {**ctx.held, "inputs_first": not ctx.held["inputs_first"]}
    return _grouped(gradient.contiguous(), *ctx.saved_tensors, **turned), None, None, None


_grouped.register_autograd(_grouped_backward, setup_context=_grouped_context)


def nf4_grouped_mm(
    rows: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Format,
    *,
    inputs_first: bool,
) -> torch.Tensor:
    """Rows up to ends[0] times expert 0's weight, the next up to ends[1] times expert 1's, and so on.

    rows [N, in], sorted by expert; ends int32 [experts], the last one N; the weight of `layout` is [experts, in, out],
    or [experts, out, in] if not `inputs_first`. In the type of `rows`, as models/moe_modules.grouped_mm.
    """
    held = {"shape": list(layout.shape), "double_quant": layout.double_quant, "inputs_first": inputs_first}
    return _grouped(rows, ends, codes, scales, **held)


def is_product(operation: Any, args: Any) -> bool:
    """Whether `operation` is one of these two; without a bias, as activation checkpointing counts products."""
    if operation is torch.ops.hypershard.nf4_linear.default:
        return args[3] is None
    return operation is torch.ops.hypershard.nf4_grouped_mm.default
