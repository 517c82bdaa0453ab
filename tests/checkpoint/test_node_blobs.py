"""Whose files on this node are looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypershard.checkpoint.memory_files import job_root
from hypershard.checkpoint.node_blobs import blobs_below, forget_run, run_root, runs_in
from hypershard.errors import StorageError


def test_root_is_the_one_that_jobs_make_and_is_not_made_here(tmp_path: Path) -> None:
    assert run_root(tmp_path, "abc") is None and runs_in(tmp_path) == []
    assert not list(tmp_path.iterdir())
    assert run_root(tmp_path, "abc") is None
    assert job_root(tmp_path, "abc") == run_root(tmp_path, "abc")
    assert [memory.run for memory in runs_in(tmp_path)] == ["abc"]


@pytest.mark.parametrize("run", ["", "..", "../other", "/etc", "a/b", "-x"])
def test_run_ids_do_not_lead_elsewhere(tmp_path: Path, run: str) -> None:
    with pytest.raises(StorageError, match="as the id of a run"):
        run_root(tmp_path, run)


def test_links_are_not_followed(tmp_path: Path) -> None:
    root = job_root(tmp_path, "abc")
    (root.parent / "linked").symlink_to(root)
    with pytest.raises(StorageError, match="is not read"):
        run_root(tmp_path, "linked")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_other_users_files_are_not_trusted(tmp_path: Path) -> None:
    root = job_root(tmp_path, "abc")
    os.chown(root, 12345, -1)
    with pytest.raises(StorageError, match="belongs to user 12345"):
        run_root(tmp_path, "abc")


def test_half_written_and_foreign_files_are_no_blobs(tmp_path: Path) -> None:
    folder = job_root(tmp_path, "abc") / "own" / "rank-00000"
    folder.mkdir(parents=True)
    (folder / "slot-0").write_bytes(bytes(10000))
    (folder / ".step-00000001.blob.tmp").write_bytes(b"HSBLOB01" + bytes(10000))
    found = blobs_below(folder.parents[1], tier="memory", run="abc")
    assert found.sets == () and found.damage == ()
    (memory,) = runs_in(tmp_path)
    assert memory.newest_step is None and memory.size_bytes >= 20000 and memory.needed_by is None
    assert forget_run(memory) and runs_in(tmp_path) == []
