"""Materialise a sharded meta model and give it its first weights.

The bits of a weight depend on the seed and the weight's name alone, never on the number of ranks or the
strategy: a tensor is drawn in blocks of rows, each from a generator seeded by (seed, name, block), and a rank
draws only the blocks that touch its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
    """Fill `parameters` (plain or sharded along rows) as `specs` say. Random numbers are drawn on `device`."""
    for spec in specs:
        parameter = parameters[spec.name]
        local, first_row = local_rows(parameter)
        if spec.init == "normal":
            _draw_normal(local, spec, first_row=first_row, seed=seed, device=device)
        else:
            local.fill_({"zeros": 0.0, "ones": 1.0}[spec.init])


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor that is whole or sharded along dimension 0, and the first one's number."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first_row, num_rows = 0, tensor.shape[0]
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"FSDP2 shards rows, found {placement}"
        # DTensor's Shard follows torch.chunk: every rank has ceil(rows / ranks) rows, the last ones fewer or none.
        chunk = -(-num_rows // tensor.device_mesh.size(dimension))
        offset = min(chunk * tensor.device_mesh.get_local_rank(dimension), num_rows)
        first_row, num_rows = first_row + offset, min(chunk, num_rows - offset)
    local = tensor.to_local()
    assert local.shape[0] == num_rows, f"{tuple(local.shape)} against {num_rows} rows"
    return local, first_row


def _draw_normal(local: torch.Tensor, spec: ParameterSpec, *, first_row: int, seed: int, device: torch.device) -> None:
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
        drawn = torch.randn((num_rows, *row_shape), generator=generator, device=device).mul_(spec.std)
        stop = min(end, start + num_rows)
        local[row - first_row : stop - first_row].copy_(drawn[row - start : stop - start])
        row = stop
