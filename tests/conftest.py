"""Fixtures every test module shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rank_pool import RankPool

# Hubs are out of reach by design: a test that asks for one must fail at once, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], RankPool]]:
    """`pools(n)`: a pool of n real ranks, started when first asked for and kept for the session."""
    started: dict[int, RankPool] = {}

    def pool(num_ranks: int) -> RankPool:
        if num_ranks not in started:
            started[num_ranks] = RankPool(num_ranks)
        return started[num_ranks]

    yield pool
    for one in started.values():
        one.close()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache of the test session's own, so that no test meets a user's."""
    return tmp_path_factory.mktemp("cache")
