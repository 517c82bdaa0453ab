"""What building a job must refuse."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.jobs import a_job, config_of, tiny
from tests.rank_pool import RankPool

from hypershard.data.open import open_dataset
from hypershard.distributed.process_group import World
from hypershard.errors import ConfigError


def error_of(world: World, flags: list[str], cache_dir: Path) -> str:
    """Build a job with flags of this rank's own."""
    try:
        with a_job(world, flags[world.ranks.rank], cache_dir):
            return ""
    except ConfigError as error:
        return str(error)


def test_ranks_with_other_flags_are_refused_by_all(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    for found in pools(2).run(error_of, [tiny(), tiny(seed=7, lr=0.01)], cache_dir):
        assert "rank 1 differs from rank 0" in found
        assert "seed 7 (rank 0: 42)" in found and "lr 0.01 (rank 0: 0.003)" in found


def test_ranks_with_other_data_under_the_same_name_are_refused(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path
) -> None:
    """As on two nodes whose local copies are not the same."""
    (member,) = open_dataset(config_of("", cache_dir=cache_dir).data).members
    assert member.train.tokenizer_path is not None  # which lies in the folder of the bins
    bins = member.train.tokenizer_path.parent
    for rank in range(2):
        shutil.copytree(bins, tmp_path / str(rank))
    text = (tmp_path / "1" / "meta.json").read_text()
    (tmp_path / "1" / "meta.json").write_text(text.replace('"sha256": "', '"sha256": "0', 1))
    for found in pools(2).run(error_of, [tiny(dataset=tmp_path / str(rank)) for rank in range(2)], cache_dir):
        assert "rank 1 differs from rank 0: train data" in found
