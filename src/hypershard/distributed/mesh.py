"""The device mesh a sharding strategy runs on."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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
