"""What the checkpoint tests save: a few odd-shaped tensors whose values follow from a number."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from hypershard.checkpoint.cadence import Cadence
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.manager import LOCAL, MEMORY, CheckpointManager, Level
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.memory import NodeSettings, NodeTiers
from hypershard.checkpoint.peers import Peers
from hypershard.checkpoint.stores import DiskStore
from hypershard.distributed.env import Surroundings

SHAPES = {
    "model/embedding": (7, 3),
    "model/one_row": (1, 4),
    "model/norm": (5,),
    "model/experts": (3, 8, 4),
    "optimizer/exp_avg/embedding": (7, 3),
}


def values(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["model/half"] = torch.randn((3, 2), generator=generator).bfloat16()
    tensors["optimizer/count"] = torch.tensor(number, dtype=torch.int64)
    return tensors


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in values(0).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def disk(directory: Path, group: dist.ProcessGroup | None = None) -> DurableTier:
    return DurableTier(Place(DiskStore(directory)), group=group)


def manager_of(
    *tiers: DurableTier,
    home: Path | None = None,
    group: dist.ProcessGroup | None = None,
    keep: int = 9,
    asynchronous: bool = False,
    memory_dir: Path | None = None,
    memory_every: int | str | None = 1,
    local_dir: Path | None = None,
    hyperpod_url: str | None = None,
    alarms: list[str] | None = None,
) -> CheckpointManager:
    """A manager of these tiers, which save when asked; memory (every step by default) and local disk where given."""
    control = Peers(group)
    settings = NodeSettings(memory_dir, 1, local_dir, 2, Surroundings(), hyperpod_url)
    homes = [DiskStore(home)] if home else [tier.store for tier in tiers]
    return CheckpointManager(
        NodeTiers(settings, peers=control, device=torch.device("cpu")),
        [Level(tier, Cadence(None), keep=keep) for tier in tiers],
        home=homes,
        memory=Cadence(memory_every if memory_dir else 0),
        local=Cadence(1 if local_dir else 0),
        control=control,
        asynchronous=asynchronous,
        failure_seconds=3600.0,
        alarm=print if alarms is None else alarms.append,
    )


def save(manager: CheckpointManager, step: int, tensors: dict[str, torch.Tensor] | None = None, **facts: int) -> None:
    """Save to every tier, beginning where nobody has."""
    tensors = values(step) if tensors is None else tensors
    if not manager._begun:
        manager.begin(0, tensors, {"step": 0, **facts})
    due = [MEMORY, LOCAL, *(level.name for level in manager.levels)]
    manager.save(step, tensors, {"step": step, **facts}, due=due)
