"""THE order in which a single-device model becomes a distributed one. Nothing else wraps, casts or moves modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..config.schema import ParallelConfig
from .activation import checkpoint_activations, no_product
from .fsdp import ShardedModule, shard
from .init import materialise
from .offload import offload_activations

# Of one block's code: with and without gradients of its input, a mask, adapters; in training and validation; for each
# kind of layer. Beyond torch's own limit of 8 it would go on uncompiled.
_MOST_GRAPHS = 64


def apply(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    device: torch.device,
    low_rank: int = 0,
    is_product: Callable[[Any, Any], bool] = no_product,
) -> ShardedModule:
    """Checkpoint, offload, compile, shard and materialise `root`, whose parameters are on the meta device.

    The parameters come back uninitialised (see `init.initialise`), in the dtypes they had, sharded over `mesh`.

    0. adapters of rank `low_rank` are in `root` already (adapters/lora.py), and packed weights, whose products
       `is_product` knows (see activation.py), so that all that follows meets them;
    1. activation checkpointing, inside everything else, so that recomputation is of the model's own code;
    2. activation offload around it, so that it meets only what checkpointing keeps;
    3. compile of the result, so that the compiler sees recomputation; hooks of FSDP2 stay outside;
    4. fully_shard, block by block, then the root;
    5. materialisation of each rank's shards only.
    """
    if parallel.compile:
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    for block in blocks:
        if parallel.activation_checkpointing != "none":
            checkpoint_activations(block, parallel.activation_checkpointing, low_rank=low_rank, is_product=is_product)
        if parallel.offload_activations:
            offload_activations(block)
        if parallel.compile:
            block.forward = torch.compile(block.forward)
    sharded = shard(root, blocks, mesh=mesh, parallel=parallel, pin_memory=device.type == "cuda")
    parameter_device = torch.device("cpu") if parallel.cpu_offload else device
    materialise(root, parameter_device=parameter_device, buffer_device=device)
    return sharded
