"""The device mesh a sharding strategy runs on."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

REPLICATE, SHARD = "replicate", "shard"


def build_mesh(strategy: str, *, world_size: int, hybrid_shard_degree: int, device_type: str) -> DeviceMesh:
    """The mesh of `strategy`.

    | strategy | mesh [replicate, shard] |
    |---|---|
    | full, zero2, zero1 | [world] (shard only) |
    | hybrid | [world / degree, degree]: neighbours shard, groups hold copies |
    | none | [world, 1]: every rank is a group of its own |
    """
    if strategy in ("full", "zero1", "zero2"):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=(SHARD,))
    degree = 1 if strategy == "none" else hybrid_shard_degree
    return init_device_mesh(device_type, (world_size // degree, degree), mesh_dim_names=(REPLICATE, SHARD))


def num_replicas(mesh: DeviceMesh) -> int:
    """How many ranks hold the same shard."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(REPLICATE)) if REPLICATE in names else 1


def shard_degree(mesh: DeviceMesh) -> int:
    """Over how many ranks each weight is spread."""
    return mesh.size() // num_replicas(mesh)


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a tensor that is plain or sharded, and where it begins in the whole, per dimension."""
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    if not isinstance(tensor, DTensor):
        return tensor, tuple(starts)
    for mesh_dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert isinstance(placement, Shard), f"FSDP2 shards, found {placement}"
        # DTensor's Shard follows torch.chunk: every rank has ceil(size / ranks), the last ones less or nothing.
        dimension = placement.dim
        chunk = -(-sizes[dimension] // tensor.device_mesh.size(mesh_dimension))
        offset = min(chunk * tensor.device_mesh.get_local_rank(mesh_dimension), sizes[dimension])
        starts[dimension] += offset
        sizes[dimension] = min(chunk, sizes[dimension] - offset)
    local = tensor.to_local()
    assert list(local.shape) == sizes, f"{tuple(local.shape)} against {sizes}"
    return local, tuple(starts)
