"""Collectives per step, counted: the minimum of each strategy, and nothing hidden besides."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jobs import a_job, tiny
from tests.rank_pool import RankPool
from torch.utils._python_dispatch import TorchDispatchMode

from hypershard.distributed.process_group import World
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

LAYERS, RANKS = 3, 2
# Besides FSDP2's: the count of valid tokens before backward, and one vector after it (loss, norm, wish to stop).
OWN_ALL_REDUCES = 2


class Collectives(TorchDispatchMode):
    """Counts what reaches the process group; torch's CommDebugMode does not survive a second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_").removesuffix("_base")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def count_step(world: World, flags: str, cache_dir: Path) -> dict[str, int]:
    with a_job(world, flags, cache_dir) as job:
        progress = advance(
            Progress(), train_step(job, Progress(), flags=tuple), seconds=0.0
        )  # lazy set-up happens here
        with Collectives() as counted:
            train_step(job, progress, flags=tuple)
        mesh_shape = tuple(job.sharded.mesh.shape)
    unknown = set(counted.counts) - {"allgather", "reduce_scatter", "allreduce"}
    assert not unknown, f"communication of another kind: {unknown}"
    return {**counted.counts, "mesh dimensions": len(mesh_shape), "shard ranks": mesh_shape[-1]}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("strategy", "gathers", "scatters", "reduces", "mesh"),
    [
        # (micro-steps, layers) -> count; the root is one more group beside the layers
        ("full", lambda a, n: a * 2 * n, lambda a, n: a * (n + 1), lambda a, n: 0, (1, 2)),
        ("zero2", lambda a, n: n + 1, lambda a, n: a * (n + 1), lambda a, n: 0, (1, 2)),
        ("zero1", lambda a, n: n + 1, lambda a, n: n + 1, lambda a, n: 0, (1, 2)),
        ("none", lambda a, n: 0, lambda a, n: 0, lambda a, n: n + 1, (2, 1)),
    ],
    ids=["full", "zero2", "zero1", "none"],
)
def test_collectives_are_the_minimum(  # noqa: PLR0917 - pytest passes by name
    pools: Callable[[int], RankPool],
    cache_dir: Path,
    strategy: str,
    gathers: Callable[[int, int], int],
    scatters: Callable[[int, int], int],
    reduces: Callable[[int, int], int],
    mesh: tuple[int, int],
    accumulation: int,
) -> None:
    flags = tiny(sharding_strategy=strategy, train_batch_size=1, gradient_accumulation_steps=accumulation)
    found = pools(RANKS).run(count_step, flags, cache_dir)[0]
    assert found.get("allgather", 0) == gathers(accumulation, LAYERS)
    assert found.get("reduce_scatter", 0) == scatters(accumulation, LAYERS)
    assert found.get("allreduce", 0) == reduces(accumulation, LAYERS) + OWN_ALL_REDUCES
    assert (found["mesh dimensions"], found["shard ranks"]) == mesh


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hybrid_is_two_dimensional_and_reduces_between_groups_once(
    pools: Callable[[int], RankPool], cache_dir: Path, accumulation: int
) -> None:
    flags = tiny(
        sharding_strategy="hybrid",
        hybrid_shard_degree=2,
        train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )
    found = pools(4).run(count_step, flags, cache_dir)[0]
    assert (found["mesh dimensions"], found["shard ranks"]) == (2, 2)
    assert found["allgather"] == accumulation * 2 * LAYERS
    assert found["reduce_scatter"] == accumulation * (LAYERS + 1)
    assert found["allreduce"] == LAYERS + 1 + OWN_ALL_REDUCES
