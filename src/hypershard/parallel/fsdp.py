"""FSDP2 under each sharding strategy: what is gathered when, what is reduced when.

For L blocks and A micro-steps (root = embedding, final norm and output head, gathered once per micro-step
because backward starts where forward ended; the last block stays gathered for the same reason):

| strategy | weights between uses | gradients between micro-steps | all-gathers | reduce-scatters | all-reduces |
|---|---|---|---|---|---|
| full   | sharded                  | sharded | A * 2L  | A * (L+1) | 0 |
| hybrid | sharded in the group     | sharded | A * 2L  | A * (L+1) | L+1 |
| zero2  | whole, gathered once     | sharded | L+1     | A * (L+1) | 0 |
| zero1  | whole, gathered once     | whole   | L+1     | L+1       | 0 |
| none   | whole, never sharded     | whole   | 0       | 0         | L+1 |

These are the minima: each row's memory contract leaves no collective out. tests/parallel counts them. Where all of the
root is frozen, beside adapters, its gradients are in no row: L reduce-scatters or all-reduces instead of L+1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from ..config.schema import ParallelConfig
from ..distributed.mesh import num_replicas, shard_degree
from ..models.base import shard_dimension


@dataclass(frozen=True)
class ShardedModule:
    """The root module under FSDP2, with the strategy's timing of communication."""

    module: FSDPModule
    strategy: str
    mesh: DeviceMesh

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same shard; a sum over all ranks counts each gradient this often."""
        return num_replicas(self.mesh)

    def begin_micro_step(self, index: int, count: int) -> None:
        """Say which of the step's `count` micro-steps comes next, before its forward."""
        last = index == count - 1
        self.module.set_is_last_backward(last)
        if self.strategy in ("zero1", "none"):
            self.module.set_requires_gradient_sync(last)
        elif self.strategy == "hybrid":
            self.module.set_requires_all_reduce(last)
        if self.strategy in ("zero1", "zero2", "none"):
            self.module.set_reshard_after_backward(last)

    def reshard(self) -> None:
        """Free gathered weights; after a forward without backward they would stay, and outlive a restore."""
        for module in fsdp_modules(self.module):
            module.reshard()


def shard(
    root: nn.Module, blocks: Sequence[nn.Module], *, mesh: DeviceMesh, parallel: ParallelConfig, pin_memory: bool
) -> ShardedModule:
    """Apply `fully_shard` to every block and then to `root`, in place.

    Rows are what ranks share, of experts fewer than the ranks another dimension (models/base.py). Gradients are summed
    over ranks, not averaged: the loss is already divided by the global count of tokens.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if parallel.bf16
        else MixedPrecisionPolicy()
    )
    offload = CPUOffloadPolicy(pin_memory=pin_memory) if parallel.cpu_offload else OffloadPolicy()
    degree = shard_degree(mesh)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter.shape, degree))

    regather = parallel.sharding_strategy in ("full", "hybrid")
    for index, block in enumerate(blocks):
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=regather and index < len(blocks) - 1,
            shard_placement_fn=placement,
            mp_policy=policy,
            offload_policy=offload,
        )
    sharded = fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    for module in fsdp_modules(sharded):  # these two settings do not reach submodules by themselves
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor of 1 needs no NCCL pre-multiplied sum
    return ShardedModule(sharded, parallel.sharding_strategy, mesh)


def fsdp_modules(root: Any) -> list[FSDPModule]:
    """The root and every block that FSDP2 manages."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]
