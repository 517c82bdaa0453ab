"""Fixtures every test module shares."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rank_pool import RankPool
from tests.s3_server import Server, environment, moto

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


@pytest.fixture(scope="session", autouse=True)
def _own_config(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test plans with a person's own calibrations, or keeps any."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


BUCKET = "checkpoints"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """A real S3 API on loopback with one bucket; this process and its children find it as boto3 finds any."""
    with moto() as server:
        before = dict(os.environ)
        os.environ.update(environment(server.endpoint))
        server.create_bucket(BUCKET)
        yield server
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def own_connections() -> Iterator[None]:
    """For a test that sets an address of its own in the environment: s3fs keeps to the first it was told."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: room for one small checkpoint, not for three."""
    path = tmp_path / "small_disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)
