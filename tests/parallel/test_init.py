"""First weights: none left out, no two ranks alike, the same bits for any layout."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.jobs import a_job, tiny
from tests.rank_pool import RankPool
from torch.distributed.tensor import DTensor

from hypershard.distributed.process_group import World


def whole_weights(world: World, flags: str, cache_dir: Path) -> dict[str, str]:
    """Digest of every parameter, gathered, and of every buffer."""
    with a_job(world, flags, cache_dir) as job:
        digests = {}
        for name, parameter in job.parameters.items():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert not full.is_meta and bool(full.isfinite().all()), name
            digests[name] = hashlib.sha256(full.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, buffer in job.module.named_buffers():
            digests[f"buffer {name}"] = hashlib.sha256(buffer.contiguous().numpy().tobytes()).hexdigest()
        return digests


def shards_differ(world: World, flags: str, cache_dir: Path) -> dict[str, float]:
    """First numbers of this rank's shard of each drawn matrix."""
    with a_job(world, flags, cache_dir) as job:
        return {
            name: float(p.to_local().flatten()[0])  # type: ignore[attr-defined]
            for name, p in job.parameters.items()
            if p.ndim == 2 and p.to_local().numel()  # type: ignore[attr-defined]
        }


def fullest_shard(world: World, flags: str, cache_dir: Path) -> tuple[int, int]:
    """Numbers of the experts that this rank holds, and of all."""
    with a_job(world, flags, cache_dir) as job:
        local = [p.to_local().numel() for name, p in job.parameters.items() if ".experts." in name]  # type: ignore[attr-defined]
        whole = [p.numel() for name, p in job.parameters.items() if ".experts." in name]
        return sum(local), sum(whole)


def test_experts_fewer_than_the_ranks_are_spread_over_all_of_them(
    pools: Callable[[int], RankPool], cache_dir: Path
) -> None:
    """By rows, one of four ranks would hold nothing of three experts, and the others a whole one each."""
    flags = "--model tiny_mixtral --num_layers 1 --num_experts 3 --bf16 0 --max_steps 1"
    assert all(local * 4 == whole for local, whole in pools(4).run(fullest_shard, flags, cache_dir))
    expected = pools(1).run(whole_weights, flags, cache_dir)[0]
    assert pools(4).run(whole_weights, flags, cache_dir) == [expected] * 4


@pytest.fixture(scope="module")
def reference(pools: Callable[[int], RankPool], cache_dir: Path) -> dict[str, str]:
    return pools(1).run(whole_weights, tiny(), cache_dir)[0]


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (2, {"sharding_strategy": "full"}),
        (2, {"sharding_strategy": "none"}),
        (2, {"sharding_strategy": "zero1", "cpu_offload": 1, "bf16": 1}),
        (4, {"sharding_strategy": "full"}),
        (4, {"sharding_strategy": "hybrid", "hybrid_shard_degree": 2}),
    ],
    ids=str,
)
def test_the_same_bits_for_any_layout(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: dict[str, str], num_ranks: int, settings: dict
) -> None:
    for found in pools(num_ranks).run(whole_weights, tiny(**settings), cache_dir):
        assert found == reference


def test_another_seed_gives_other_weights_but_the_same_norms(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: dict[str, str]
) -> None:
    other = pools(1).run(whole_weights, tiny(seed=43), cache_dir)[0]
    same = {name for name in reference if reference[name] == other[name]}
    assert same == {name for name in reference if "norm" in name or name.startswith("buffer")}


def test_no_two_matrices_and_no_two_shards_are_alike(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    first, second = pools(2).run(shards_differ, tiny(), cache_dir)
    assert all(first[name] != second[name] for name in first)
    assert len(set(first.values())) == len(first) > 10


def test_block_boundaries_do_not_show() -> None:
    """A tensor of several blocks of rows, drawn whole and drawn in uneven parts."""
    from hypershard.models.family import ParameterSpec
    from hypershard.parallel.init import _BLOCK_NUMEL, _draw

    rows_per_block = 4
    spec = ParameterSpec("w", (19, _BLOCK_NUMEL // rows_per_block), "normal", 0.5)
    device = torch.device("cpu")
    whole = torch.empty(spec.shape)
    _draw(whole, spec, starts=(0, 0), seed=1, device=device)
    for start, stop in ((0, 3), (3, 10), (10, 10), (10, 19)):
        part = torch.empty((stop - start, spec.shape[1]))
        _draw(part, spec, starts=(start, 0), seed=1, device=device)
        assert torch.equal(part, whole[start:stop])
    assert float(whole.std()) == pytest.approx(0.5, rel=1e-3)
    assert not torch.equal(whole[0], whole[4])  # blocks are drawn apart
