"""What each rank of a pool does in the tests of many ranks."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import torch
from tiny import blank, disk, manager_of, values
from tiny import save as save_with
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.hf import load_hf_weights
from hypershard.checkpoint.hf_folder import read_model_folder
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manager import CheckpointManager
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import open_store
from hypershard.distributed.process_group import World
from hypershard.errors import HypershardError
from hypershard.models.base import shard_dimension


def mesh_of(world: World, replicas: int) -> DeviceMesh:
    if replicas == 0:
        return init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def sharded(tensors: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """As FSDP2 shards (parallel/fsdp.py) over the last mesh dimension; a number stays plain, the same on every rank."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        degree = mesh.size(mesh.ndim - 1)
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(shard_dimension(tensor.shape, degree))]
        return distribute_tensor(tensor, mesh, placements)

    return {name: placed(tensor) if tensor.ndim else tensor for name, tensor in tensors.items()}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def manager_at(world: World, place: str, tier: str, asynchronous: bool = False) -> CheckpointManager:
    """A manager of one tier: "disk" or "s3" at `place`, or "memory" or "local" below it."""
    group = world.checkpoint_group
    if tier in ("disk", "s3"):
        durable = DurableTier(Place(open_store(place)), group=group)
        return manager_of(durable, group=group, asynchronous=asynchronous)
    folder = {f"{tier}_dir": Path(place)}
    return manager_of(home=Path(place), group=group, asynchronous=asynchronous, **folder)


def save(world: World, place: str, step: int, replicas: int, asynchronous: bool, tier: str = "disk") -> None:  # noqa: PLR0917
    manager = manager_at(world, place, tier, asynchronous)
    tensors = sharded(values(step), mesh_of(world, replicas))
    save_with(manager, step, tensors, tokens=step)
    if asynchronous:
        manager.settle()
        for tensor in tensors.values():
            tensor.fill_(99)
    manager.finish()


def load(world: World, place: str, replicas: int, tier: str = "disk") -> tuple[dict | None, dict[str, torch.Tensor]]:
    tensors = sharded(blank(), mesh_of(world, replicas))
    facts = manager_at(world, place, tier).restore(tensors)
    return facts, {name: tensor.clone() for name, tensor in whole(tensors).items()}


def set_environment(world: World, environment: dict[str, str]) -> None:
    os.environ.update(environment)


def train_and_save(world: World, directory: Path) -> dict[str, torch.Tensor]:
    """A real FSDP2 model and AdamW, shapes that do not divide; returns what was saved, whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    for layer in model:
        fully_shard(layer, mesh=mesh_of(world, 0))
    fully_shard(model, mesh=mesh_of(world, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    tensors = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    tensors |= {f"optimizer/exp_avg/{name}": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    manager = manager_of(disk(directory, world.checkpoint_group), group=world.checkpoint_group, asynchronous=True)
    save_with(manager, 1, tensors)
    expected = {name: tensor.detach().clone() for name, tensor in whole(tensors).items()}
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    manager.finish()
    return expected


def error_of_verify(world: World, directory: Path) -> str:
    tier = disk(directory, world.checkpoint_group)
    return message(lambda: tier.verify(tier.list()[0]))


def error_when_one_rank_cannot_write(world: World, directory: Path) -> str:
    tier = disk(directory, world.checkpoint_group)
    snapshot = take_snapshot(sharded(values(1), mesh_of(world, 0)))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
    try:
        return message(lambda: tier.save(7, snapshot, {}, Lineage(1, "")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def error_of_unshared_directory(world: World, directory: Path) -> str:
    own = directory / str(world.ranks.rank)
    return message(disk(own, world.checkpoint_group).probe)


def error_when_one_rank_has_another_model(world: World, directory: Path) -> str:
    tensors = sharded(blank(), mesh_of(world, 0))
    if world.ranks.rank == 1:
        tensors.pop("model/norm")
    tier = disk(directory, world.checkpoint_group)
    return message(lambda: tier.load(tier.list()[0], tensors))


def message(action) -> str:
    try:
        action()
    except HypershardError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def hf_rows(world: World, directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    tensors = sharded({name: torch.zeros(shape) for name, shape in shapes.items()}, mesh_of(world, 0))
    load_hf_weights(read_model_folder(str(directory)), tensors)
    return {name: tensor.clone() for name, tensor in whole(tensors).items()}
