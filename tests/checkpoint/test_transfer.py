"""Copies that fail, and what is left of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny import disk, values

from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import find_place
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import MANIFEST, DiskStore
from hypershard.checkpoint.transfer import Progress, Stopped, copy_belongings, copy_checkpoint, in_parallel
from hypershard.errors import CheckpointError, DamagedCheckpoint, StorageError


def stored_in(directory: Path):
    disk(directory).save(1, take_snapshot(values(1)), {}, Lineage(1, "first"))
    return find_place(str(directory)).finished()[0]


def test_first_error_stops_the_others_and_is_the_one_raised() -> None:
    progress, stopped = Progress(), threading.Event()

    def fail() -> None:
        raise StorageError("full")

    def work() -> None:
        while True:
            try:
                progress.advance(1)
            except Stopped:
                stopped.set()
                raise

    with pytest.raises(StorageError, match="full"):
        in_parallel([work, fail, work], num_threads=2, progress=progress)
    assert stopped.is_set()


def test_progress_counts_every_byte_once_and_goes_on_to_the_next_copy(tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "a")
    seen: list[int] = []
    progress = Progress(seen.append)
    for number in range(2):
        copy_checkpoint(stored, stored.manifest(), DiskStore(tmp_path / str(number)), progress)
    assert sum(seen) == 2 * stored.manifest().size_bytes


@pytest.mark.parametrize("loss", ["missing", "truncated", "flipped"])
def test_damage_on_the_way_leaves_nothing(tmp_path: Path, loss: str) -> None:
    stored = stored_in(tmp_path / "a")
    path = tmp_path / "a" / stored.folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    if loss == "missing":
        path.unlink()
    else:
        path.write_bytes(content if loss == "flipped" else content[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp"):
        copy_checkpoint(stored, stored.manifest(), DiskStore(tmp_path / "b"), Progress())
    assert not list((tmp_path / "b").iterdir())


def test_full_disk_is_said_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "a")
    (small_disk / "fill").write_bytes(bytes(256 * 1024 - 8192))
    with pytest.raises(StorageError, match="no space left"):
        copy_checkpoint(stored, stored.manifest(), DiskStore(small_disk / "b"), Progress())
    assert not list((small_disk / "b").iterdir())


def test_manifest_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_in(tmp_path / "a")
    order: list[str] = []
    write, stream = DiskStore.write, DiskStore.stream
    monkeypatch.setattr(DiskStore, "write", lambda self, *a, **k: (order.append(a[1]), write(self, *a, **k))[1])
    monkeypatch.setattr(DiskStore, "stream", lambda self, *a, **k: (order.append(a[1]), stream(self, *a, **k))[1])
    copy_checkpoint(stored, stored.manifest(), DiskStore(tmp_path / "b"), Progress())
    assert sorted(order[:-1]) == sorted(stored.manifest().files) and order[-1] == MANIFEST


def test_belongings_of_the_destination_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored_in(tmp_path / "a")
    (tmp_path / "a" / "run-id").write_text("one\n")
    (tmp_path / "a" / "config.yaml").write_text("model: {}\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run-id").write_text("other\n")
    assert copy_belongings(find_place(str(tmp_path / "a")), DiskStore(tmp_path / "b")) == ["config.yaml"]
    assert (tmp_path / "b" / "run-id").read_text() == "other\n"
    assert "holds checkpoints of another run too" in caplog.text


def test_manifest_that_names_other_files_is_refused(tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "a")
    path = tmp_path / "a" / stored.folder / MANIFEST
    path.write_text(path.read_text().replace("__0_0.distcp", "../../secret"))
    with pytest.raises(CheckpointError, match="expected plain file names"):
        stored.manifest()
