"""NF4: a frozen weight in four bits and a share of a scale (QLoRA, arXiv 2305.14314, section 3); see nf4_format.py.

A weight is LEVELS[code] x absmax, in float32, rounded once to the type asked for. Codes and plain scales are those of
bitsandbytes. Double quantisation has the paper's sizes (8 bits, groups of 256), but where bitsandbytes subtracts the
mean over the tensor and takes a logarithmic byte, here absmax = minimum + step x byte, with step = (maximum - minimum)
/ 255 of the group: a mean needs all rows, and a sum's last bit depends on how it is cut, while minimum and maximum are
exact. The error of an absmax is at most step / 2: of normal weights below 0.4% of it, and 0.07% on average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .nf4_format import BLOCK, GROUP, Format

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: the paper's appendix E, digits as there.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_SMALLEST = 1e-38  # what a block of zeros is divided by; bitsandbytes' number
_CHUNK_WEIGHTS = 2**23  # worked on at a time: temporaries of about 100 MB, whatever the weight's size


@dataclass(frozen=True)
class Quantised:
    """Rows in NF4: codes uint8 [rows, code_bytes], scales uint8 [rows, scale_bytes]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def rows(self, start: int, stop: int) -> Quantised:
        """A view of some rows."""
        return Quantised(self.codes[start:stop], self.scales[start:stop])


# --- to four bits


def quantise(weight: torch.Tensor, *, double_quant: bool) -> Quantised:
    """`weight` [..., columns] of any float type, in NF4, on its device."""
    layout = Format(tuple(weight.shape), double_quant)
    quantised = Quantised(
        torch.empty(layout.num_rows, layout.code_bytes, dtype=torch.uint8, device=weight.device),
        torch.empty(layout.num_rows, layout.scale_bytes, dtype=torch.uint8, device=weight.device),
    )
    quantise_into(quantised, weight, layout)
    return quantised


@torch.no_grad()
def quantise_into(quantised: Quantised, weight: torch.Tensor, layout: Format) -> None:
    """Write `weight` [..., columns], some rows of a weight of `layout`, over `quantised`, working on its device."""
    rows = weight.reshape(-1, weight.shape[-1])
    assert rows.shape[-1] == layout.shape[-1] and rows.shape[0] == quantised.codes.shape[0]
    for start, stop in _chunks(rows.shape[0], layout):
        part = rows[start:stop].to(quantised.codes.device)
        codes, absmax = _quantise_rows(part)
        quantised.codes[start:stop] = codes
        quantised.scales[start:stop] = _pack_scales(absmax, layout)


def _chunks(num_rows: int, layout: Format) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // (layout.num_blocks * BLOCK))
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> codes uint8 [rows, code_bytes], absmax float32 [rows, blocks]."""
    blocks = F.pad(rows.float(), (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1)
    # Times the reciprocal, as bitsandbytes: a quotient can fall on the other side of a border between two levels.
    scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
    nearest = torch.bucketize(scaled.clamp_(-1, 1), _borders(rows.device), out_int32=True).to(torch.uint8).flatten(1)
    return (nearest[:, ::2] << 4) | nearest[:, 1::2], absmax


def _pack_scales(absmax: torch.Tensor, layout: Format) -> torch.Tensor:
    """absmax [rows, blocks] -> uint8 [rows, scale_bytes]."""
    if not layout.double_quant:
        return absmax.contiguous().view(torch.uint8)
    missing = -layout.num_blocks % GROUP
    grouped = F.pad(absmax.unsqueeze(0), (0, missing), mode="replicate")[0].unflatten(1, (-1, GROUP))
    minimum, maximum = grouped.aminmax(dim=-1)
    step = (maximum - minimum) / 255
    divisor = torch.where(step > 0, step, 1.0)  # of a group of equals every byte is 0
    levels = ((grouped - minimum.unsqueeze(-1)) / divisor.unsqueeze(-1)).round_().clamp_(0, 255)
    numbers = torch.cat([minimum, step], dim=1).view(torch.uint8)
    used = levels.to(torch.uint8).flatten(1)[:, : layout.num_blocks]
    return torch.cat([numbers, F.pad(used, (0, -layout.num_blocks % 4))], dim=1)


# --- and back


@torch.no_grad()
def dequantise(quantised: Quantised, layout: Format, *, dtype: torch.dtype) -> torch.Tensor:
    """The weights [rows, columns] that `quantised`, some or all rows of a weight of `layout`, stands for."""
    codes = quantised.codes.unflatten(1, (-1, BLOCK // 2))
    absmax = unpack_scales(quantised.scales, layout)
    if _fused is not None and codes.shape[0]:
        weight = _fused(codes, absmax, _pairs(codes.device), dtype)
    else:
        weight = torch.empty(*codes.shape[:2], BLOCK, dtype=dtype, device=codes.device)
        for start, stop in _chunks(codes.shape[0], layout):
            values = _levels(codes[start:stop], _pairs(codes.device))
            torch.mul(values, absmax[start:stop].unsqueeze(-1), out=weight[start:stop])
    return weight.flatten(1)[:, : layout.shape[-1]]


def unpack_scales(scales: torch.Tensor, layout: Format) -> torch.Tensor:
    """Scales uint8 [rows, scale_bytes] -> absmax float32 [rows, blocks]."""
    numbers = scales.view(torch.float32)
    if not layout.double_quant:
        return numbers
    groups = layout.num_groups
    levels = scales[:, 8 * groups : 8 * groups + layout.num_blocks].float()
    minimum, step = numbers[:, :groups], numbers[:, groups : 2 * groups]
    if groups > 1:
        minimum, step = (part.repeat_interleave(GROUP, dim=1)[:, : layout.num_blocks] for part in (minimum, step))
    return levels.mul_(step).add_(minimum)


def _levels(codes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """codes [rows, blocks, 32] -> float32 [rows, blocks, 64]."""
    return pairs.index_select(0, codes.flatten().int()).view(*codes.shape[:2], BLOCK)


def _expand(codes: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (_levels(codes, pairs) * absmax.unsqueeze(-1)).to(dtype)


_fused: Callable[..., torch.Tensor] | None = None


def fuse_dequantisation() -> None:
    """From here on this process dequantises in one compiled kernel; for runs that compile, on a GPU. Values stay.

    Operation by operation a weight costs about 14 bytes of memory traffic, in one kernel 2.5: its code and its value.
    """
    global _fused
    _fused = torch.compile(_expand, dynamic=True)


@functools.cache
def _borders(device: torch.device) -> torch.Tensor:
    levels = torch.tensor(LEVELS)
    return ((levels[:-1] + levels[1:]) / 2).to(device)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """For each byte of codes its two levels, float32 [256, 2]."""
    levels = torch.tensor(LEVELS)
    return torch.cartesian_prod(levels, levels).to(device)
