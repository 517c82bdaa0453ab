"""From the checkpoint section to the tiers that are on, nearest first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ..checkpoint.cadence import Cadence
from ..checkpoint.durable import DurableTier
from ..checkpoint.manager import CheckpointManager, Level
from ..checkpoint.manifest import Place
from ..checkpoint.memory import NodeSettings, NodeTiers
from ..checkpoint.peers import Peers
from ..checkpoint.policy import mean_seconds_between_failures
from ..checkpoint.stores import DiskStore, Store, open_store
from ..config.schema import CheckpointConfig
from ..distributed.env import Surroundings
from ..distributed.process_group import World, new_host_group
from ..storage import local_path


def build_checkpoints(
    checkpoint: CheckpointConfig,
    world: World,
    *,
    checkpoint_dir: Path,
    surroundings: Surroundings,
    alarm: Callable[[str], None],
) -> CheckpointManager:
    """The manager of all tiers that `checkpoint` turns on. Collective. Raises StorageError for a URI that is none."""
    control = Peers(world.checkpoint_group)
    disk = DiskStore(checkpoint_dir)
    home: list[Store] = [disk]
    levels = []
    if checkpoint.checkpoint_freq != 0:
        levels.append(
            Level(
                DurableTier(Place(disk), group=_own_group(world)),
                Cadence(checkpoint.checkpoint_freq),
                keep=checkpoint.keep_checkpoints,
                keep_best=checkpoint.keep_best,
            )
        )
    if checkpoint.s3_tier_base_path is not None and checkpoint.s3_checkpointing_freq != 0:
        bucket, seconds = open_store(checkpoint.s3_tier_base_path), checkpoint.s3_save_minutes * 60
        home.append(bucket)
        levels.append(
            Level(
                DurableTier(Place(bucket), group=_own_group(world, wait_seconds=seconds), save_seconds=seconds),
                Cadence(checkpoint.s3_checkpointing_freq),
                keep=checkpoint.keep_s3_checkpoints,
                keep_every=checkpoint.keep_s3_every,
                keep_best=checkpoint.keep_best,
            )
        )
    memory = Cadence(checkpoint.in_memory_checkpointing_freq or 0)
    local = Cadence((checkpoint.local_checkpointing_freq or 0) if checkpoint.local_tier_dir else 0)
    settings = NodeSettings(
        memory_dir=local_path(checkpoint.memory_tier_dir, flag="--memory_tier_dir") if memory.is_on else None,
        num_copies=checkpoint.num_memory_copies,
        local_dir=local_path(checkpoint.local_tier_dir, flag="--local_tier_dir")
        if checkpoint.local_tier_dir and local.is_on
        else None,
        keep_local=checkpoint.keep_local_checkpoints,
        around=surroundings,
        hyperpod_url="" if checkpoint.hyperpod_memory_url == "default" else checkpoint.hyperpod_memory_url,
    )
    return CheckpointManager(
        NodeTiers(settings, peers=control, device=world.device),
        levels,
        home=home,
        memory=memory,
        local=local,
        control=control,
        asynchronous=checkpoint.async_checkpointing,
        failure_seconds=mean_seconds_between_failures(world.size, mtbf_hours=checkpoint.mtbf_hours),
        alarm=alarm,
    )


def _own_group(world: World, *, wait_seconds: float = 0.0) -> dist.ProcessGroup | None:
    return new_host_group(wait_seconds=wait_seconds) if world.size > 1 else None
