"""What a checkpoint is made of must be what trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.jobs import a_job, tiny
from tests.rank_pool import RankPool
from torch.distributed.tensor import DTensor

from hypershard.distributed.process_group import World
from hypershard.train.rehearse import rehearse
from hypershard.train.state import Progress
from hypershard.train.step import train_step


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stale_tensors(world: World, flags: str, cache_dir: Path) -> list[str]:
    """Names whose checkpoint tensor is not the trained one after a step."""
    with a_job(world, flags, cache_dir) as job:
        rehearse(job)
        train_step(job, Progress(), flags=tuple)
        tensors = job.tensors()
        live = {f"model/{name}": parameter for name, parameter in job.parameters.items()}
        for name, parameter in job.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                live[f"optimizer/{moment}/{name}"] = job.optimizer.state[parameter][moment]
        assert tensors.keys() == live.keys()
        return [name for name, tensor in live.items() if not torch.equal(whole(tensor), whole(tensors[name]))]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"cpu_offload": 1}], ids=["on the device", "offloaded"])
def test_checkpoint_tensors_are_the_trained_ones(
    pools: Callable[[int], RankPool], cache_dir: Path, num_ranks: int, settings: dict
) -> None:
    """Over three ranks rows do not divide evenly, and FSDP2 replaces the shards by padded ones at the first forward."""
    for stale in pools(num_ranks).run(stale_tensors, tiny(train_batch_size=1, **settings), cache_dir):
        assert not stale
