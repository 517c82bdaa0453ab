"""Many ranks: saved by some number of them, loaded by another, and one rank's trouble told by all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoint_ranks as ranks
import pytest
import torch
from tests.conftest import BUCKET
from tests.rank_pool import RankPool
from tests.s3_server import Server, environment
from tiny import blank, disk, manager_of, same, save, values

from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.stores import open_store


def load_alone(place: str | Path, tier: str = "disk") -> dict[str, torch.Tensor]:
    tensors = blank()
    if tier in ("disk", "s3"):
        manager = manager_of(DurableTier(Place(open_store(str(place)))))
    else:
        manager = manager_of(home=Path(place), **{f"{tier}_dir": Path(place)})
    assert manager.restore(tensors) is not None
    return tensors


@pytest.fixture(params=["disk", "memory", "local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_server: Server) -> tuple[str, str]:
    """A tier's name, and where it lies."""
    return request.param, f"s3://{BUCKET}/{tmp_path.name}" if request.param == "s3" else str(tmp_path)


@pytest.mark.parametrize(("asynchronous", "replicas"), [(False, 0), (True, 0), (True, 1), (False, 2)])
def test_two_ranks_save_and_any_number_loads(
    pools: Callable[[int], RankPool], place: tuple[str, str], s3_server: Server, asynchronous: bool, replicas: int
) -> None:
    """Also from full to hybrid sharding and back."""
    tier, where = place
    for number in (2, 3):
        pools(number).run(ranks.set_environment, environment(s3_server.endpoint))
    pools(2).run(ranks.save, where, 4, replicas, asynchronous, tier)
    assert same(load_alone(where, tier), values(4))
    for number, loading_replicas in ((2, 0), (2, 2), (3, 0)):
        for facts, tensors in pools(number).run(ranks.load, where, loading_replicas, tier):
            assert facts == {"step": 4, "tokens": 4}
            assert same(tensors, values(4))


@pytest.mark.parametrize("replicas", [0, 2])
def test_four_ranks_save_and_two_load(
    pools: Callable[[int], RankPool], place: tuple[str, str], s3_server: Server, replicas: int
) -> None:
    tier, where = place
    for number in (2, 4):
        pools(number).run(ranks.set_environment, environment(s3_server.endpoint))
    pools(4).run(ranks.save, where, 6, replicas, True, tier)
    for _, tensors in pools(2).run(ranks.load, where, replicas, tier):
        assert same(tensors, values(6))


def test_replicas_make_up_for_each_other_in_memory(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Two replicas of one rank each: either one's blob is the whole checkpoint, and a damaged one is made up for."""
    pools(2).run(ranks.save, str(tmp_path), 4, 2, False, "memory")
    for path in tmp_path.glob("hypershard-*/*/own/rank-00000/slot-*"):
        content = bytearray(path.read_bytes())
        content[4200] ^= 1
        path.write_bytes(content)
    assert same(load_alone(tmp_path, "memory"), values(4))
    for path in tmp_path.glob("hypershard-*/*/own/rank-00000/slot-*"):
        path.unlink()
    for _, tensors in pools(3).run(ranks.load, str(tmp_path), 0, "memory"):
        assert same(tensors, values(4))


def test_memory_of_one_rank_alone_is_no_checkpoint(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    pools(2).run(ranks.save, str(tmp_path), 4, 0, False, "memory")
    for path in tmp_path.glob("hypershard-*/*/own/rank-00001/slot-*"):
        path.unlink()
    for facts, _ in pools(2).run(ranks.load, str(tmp_path), 0, "memory"):
        assert facts is None


def test_one_or_three_ranks_save_and_two_load(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    save(manager_of(disk(tmp_path / "one")), 5)
    pools(3).run(ranks.save, str(tmp_path / "three"), 6, 0, True)
    assert same(load_alone(tmp_path / "three"), values(6))
    for directory, number in (("one", 5), ("three", 6)):
        for _, tensors in pools(2).run(ranks.load, str(tmp_path / directory), 0):
            assert same(tensors, values(number))


def test_fsdp_model_and_moments_while_training_goes_on(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    expected = pools(2).run(ranks.train_and_save, tmp_path)[0]
    found = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
    manager_of(disk(tmp_path)).restore(found)
    assert same(found, expected)


def test_damage_is_the_same_error_on_all_ranks(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    pools(2).run(ranks.save, str(tmp_path), 4, 0, False)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        path = tmp_path / "step-00000004" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    errors = pools(2).run(ranks.error_of_verify, tmp_path)
    assert errors[0] == errors[1]
    assert errors[0].startswith("DamagedCheckpoint") and "__0_0.distcp" in errors[0] and "__1_0.distcp" in errors[0]


def test_one_rank_that_cannot_write_is_told_by_all_and_leaves_nothing(
    pools: Callable[[int], RankPool], tmp_path: Path
) -> None:
    pools(2).run(ranks.save, str(tmp_path), 4, 0, False)
    errors = pools(2).run(ranks.error_when_one_rank_cannot_write, tmp_path)
    for error in errors:
        assert error.startswith("StorageError") and "File too large" in error
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000004"]
    assert same(pools(2).run(ranks.load, str(tmp_path), 0)[1][1], values(4))


def test_unshared_directory_is_refused_by_all(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    for error in pools(2).run(ranks.error_of_unshared_directory, tmp_path):
        assert error.startswith("StorageError") and "not seen by rank(s) 1" in error


def test_one_rank_with_another_model_is_told_by_all(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    pools(2).run(ranks.save, str(tmp_path), 4, 0, False)
    for error in pools(2).run(ranks.error_when_one_rank_has_another_model, tmp_path):
        assert error.startswith("CheckpointError") and "model/norm: found in the checkpoint" in error
