"""Materialise a sharded meta model and give it its first weights.

The bits of a weight depend on the seed and the weight's name alone, never on the number of ranks or the
strategy: a tensor is drawn in blocks of rows, each from a generator seeded by (seed, name, block), and a rank
draws only the blocks that touch its rows, of which it keeps its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..distributed.mesh import local_part
from ..models.family import ParameterSpec

_BLOCK_NUMEL = 2**20  # numbers drawn per generator; part of what defines the bits, so never change it


def materialise(root: nn.Module, *, parameter_device: torch.device, buffer_device: torch.device) -> None:
    """Replace meta parameters by uninitialised ones on `parameter_device` and move buffers, in place.

    Ties survive: a parameter that several modules share is replaced once (nn.Module.to_empty would untie it).
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device=parameter_device)
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[parameter])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(buffer_device)


@torch.no_grad()
def initialise(
    parameters: Mapping[str, torch.Tensor], specs: Sequence[ParameterSpec], *, seed: int, device: torch.device
) -> None:
    """Fill `parameters` (plain or sharded) as `specs` say. Random numbers are drawn on `device`."""
    for spec in specs:
        local, starts = local_part(parameters[spec.name])
        initialise_part(local, spec, starts=starts, seed=seed, device=device)


@torch.no_grad()
def initialise_part(
    local: torch.Tensor, spec: ParameterSpec, *, starts: Sequence[int], seed: int, device: torch.device
) -> None:
    """Fill `local`, the part of a weight whose first element is at `starts`, as `spec` says."""
    if spec.init in ("normal", "uniform"):
        _draw(local, spec, starts=starts, seed=seed, device=device)
    else:
        local.fill_({"zeros": 0.0, "ones": 1.0}[spec.init])


def _draw(local: torch.Tensor, spec: ParameterSpec, *, starts: Sequence[int], seed: int, device: torch.device) -> None:
    first_row = starts[0]
    within = tuple(slice(start, start + size) for start, size in zip(starts[1:], local.shape[1:], strict=True))
    row_shape = tuple(spec.shape[1:])
    row_numel = 1
    for size in row_shape:
        row_numel *= size
    rows_per_block = max(1, _BLOCK_NUMEL // row_numel)
    row, end = first_row, first_row + local.shape[0]
    while row < end:
        block = row // rows_per_block
        start = block * rows_per_block
        num_rows = min(rows_per_block, spec.shape[0] - start)
        key = hashlib.blake2b(f"{seed}/{spec.name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)
        draw = torch.randn if spec.init == "normal" else _uniform
        drawn = draw((num_rows, *row_shape), generator=generator, device=device).mul_(spec.std)
        stop = min(end, start + num_rows)
        local[row - first_row : stop - first_row].copy_(drawn[(slice(row - start, stop - start), *within)])
        row = stop


def _uniform(shape: tuple[int, ...], *, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Evenly spread around 0 with a standard deviation of 1, that is, between -sqrt(3) and sqrt(3)."""
    return torch.rand(shape, generator=generator, device=device).sub_(0.5).mul_(math.sqrt(12))
