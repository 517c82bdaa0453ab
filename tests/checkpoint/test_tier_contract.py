"""What every tier must do. A new tier adds one harness to HARNESSES: how it saves, and how its bytes are damaged."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import boto3
import pytest
import torch
from tests.conftest import BUCKET
from tests.s3_server import Server
from tiny import blank, disk, manager_of, same, values
from tiny import save as save_with

from hypershard.checkpoint.blob import HEAD_BYTES, blob_bytes
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.memory_files import scan
from hypershard.checkpoint.restore import Search, restore_newest
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import open_store
from hypershard.checkpoint.tier import Tier
from hypershard.errors import CheckpointError, DamagedCheckpoint, StorageError

LINEAGE = Lineage(1, "test")


class Harness(Protocol):
    """A tier with a way to save to it and to spoil what it holds. Files are named by what they hold."""

    tier: Tier

    def save(self, step: int, number: int | None = None) -> None:
        """Save `values(number)`, by default of the step's number, with facts {"step": step, "tokens": 100 * step}."""

    def files(self, step: int) -> dict[str, str]:
        """What holds "data", and where there are such files "layout", "facts" and "manifest" -> its name."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes | None) -> None:
        """Replace a file by other bytes, or with None by nothing."""


class DiskHarness:
    def __init__(self, directory: Path, server: Server):
        self.tier: DurableTier = disk(directory)

    def save(self, step: int, number: int | None = None) -> None:
        tensors = values(step if number is None else number)
        self.tier.save(step, take_snapshot(tensors), {"tokens": step * 100}, LINEAGE)

    def files(self, step: int) -> dict[str, str]:
        folder = self.tier.store.where(f"step-{step:08d}")
        names = {"data": "__0_0.distcp", "layout": ".metadata", "facts": "facts.json", "manifest": "MANIFEST.json"}
        return {what: f"{folder}/{name}" for what, name in names.items()}

    def read(self, name: str) -> bytes:
        return Path(name).read_bytes()

    def write(self, name: str, content: bytes | None) -> None:
        if content is None:
            Path(name).unlink()
        else:
            Path(name).write_bytes(content)


class S3Harness(DiskHarness):
    def __init__(self, directory: Path, server: Server):
        self.client = boto3.client("s3", endpoint_url=server.endpoint)
        self.tier = DurableTier(Place(open_store(f"s3://{BUCKET}/{directory.parent.name}/checkpoints")))

    def _key(self, name: str) -> dict[str, str]:
        bucket, _, key = name.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": key}

    def read(self, name: str) -> bytes:
        return self.client.get_object(**self._key(name))["Body"].read()

    def write(self, name: str, content: bytes | None) -> None:
        if content is None:
            self.client.delete_object(**self._key(name))
        else:
            self.client.put_object(**self._key(name), Body=content)


class BlobHarness:
    """Memory slots, or files on a node-local disk."""

    def __init__(self, directory: Path, kind: str):
        directory.mkdir()
        self._root = directory
        self._settings = {"home": directory / "home", f"{kind}_dir": directory}
        self.start()

    def start(self) -> None:
        """As a new process would: go on from what is there, or begin."""
        self._manager = manager_of(**self._settings)
        facts = self._manager.restore(blank()) or {"step": 0}
        self._manager.begin(facts["step"], values(0), {"tokens": 0})
        (self.tier,) = self._manager._nodes.open(self._manager._run or "")

    def save(self, step: int, number: int | None = None) -> None:
        save_with(self._manager, step, values(step if number is None else number), tokens=step * 100)

    def files(self, step: int) -> dict[str, str]:
        (root,) = self._root.glob("hypershard-*/*")
        return {"data": next(str(path) for path, table in scan(root) if table.step == step)}

    def read(self, name: str) -> bytes:
        """The blob alone: a slot is a little larger."""
        content = Path(name).read_bytes()
        return content[: blob_bytes(content[:HEAD_BYTES])]

    def write(self, name: str, content: bytes | None) -> None:
        """What damages files happens while no process has them mapped."""
        if content is None:
            Path(name).unlink()
        else:
            Path(name).write_bytes(content)


HARNESSES: dict[str, Callable[[Path, Server], Harness]] = {
    "disk": DiskHarness,
    "s3": S3Harness,
    "memory": lambda directory, _: BlobHarness(directory, "memory"),
    "local": lambda directory, _: BlobHarness(directory, "local"),
}


@pytest.fixture(params=HARNESSES)
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_server: Server) -> Harness:
    return HARNESSES[request.param](tmp_path / "checkpoints", s3_server)


@pytest.fixture(params=["disk", "s3"])
def durable(request: pytest.FixtureRequest, tmp_path: Path, s3_server: Server) -> Harness:
    return HARNESSES[request.param](tmp_path / "checkpoints", s3_server)


def restore(tier: Tier) -> tuple[dict[str, torch.Tensor], Search]:
    tensors = blank()
    return tensors, restore_newest([tier], tensors)


def flipped(content: bytes, where: float) -> bytes:
    changed = bytearray(content)
    changed[int(len(changed) * where)] ^= 1
    return bytes(changed)


def damage(place: Harness, step: int, what: str = "data", where: float = 0.5) -> str:
    name = place.files(step)[what]
    place.write(name, flipped(place.read(name), where))
    return name


def test_round_trip_is_bit_equal(place: Harness) -> None:
    place.save(3)
    tensors, found = restore(place.tier)
    assert found.record is not None and found.record.step == 3
    assert found.facts["step"] == 3 and found.facts["tokens"] == 300
    assert same(tensors, values(3))
    place.tier.verify(found.record)


def test_nothing_saved_is_none(place: Harness) -> None:
    assert restore(place.tier)[1].record is None


def test_newest_wins(place: Harness) -> None:
    for step in (2, 9, 10):
        place.save(step)
    assert [record.step for record in place.tier.list()][:2] == [10, 9]
    assert same(restore(place.tier)[0], values(10))


def test_interrupted_save_is_invisible(place: Harness) -> None:
    place.save(1)
    place.save(2)
    files = place.files(2)
    if "manifest" in files:
        place.write(files["manifest"], None)
    else:  # a blob's head is written last
        place.write(files["data"], bytes(4096) + place.read(files["data"])[4096:])
    assert [record.step for record in place.tier.list()] == [1]
    assert restore(place.tier)[1].facts["step"] == 1
    if isinstance(place, BlobHarness):
        place.start()
    place.save(3)
    assert [record.step for record in place.tier.list()] == [3, 1]


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_flipped_bit_is_named_and_the_older_one_used(
    place: Harness, where: float, caplog: pytest.LogCaptureFixture
) -> None:
    place.save(1)
    place.save(2)
    name = place.files(2)["data"]
    content = bytearray(place.read(name))
    content[4096 + int(300 * where)] ^= 4  # within the tensors, whatever the format
    place.write(name, bytes(content))
    newest = place.tier.list()[0]
    with pytest.raises(DamagedCheckpoint, match=rf"{name}: found checksum \w+ of bytes .* expected \w+"):
        place.tier.verify(newest)
    tensors, found = restore(place.tier)
    assert found.facts["step"] == 1
    assert same(tensors, values(1))
    assert any(name in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)


@pytest.mark.parametrize("where", [i / 12 for i in range(12)])
def test_a_flipped_bit_anywhere_never_loads_other_values(place: Harness, where: float) -> None:
    place.save(1)
    place.save(2)
    damage(place, 2, where=where)
    tensors, found = restore(place.tier)
    assert found.record is not None and same(tensors, values(found.facts["step"]))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_and_missing_data_is_passed_over(place: Harness, keep: float) -> None:
    place.save(1)
    place.save(2)
    name = place.files(2)["data"]
    content = place.read(name)
    place.write(name, content[: int(len(content) * keep)] if keep else None)
    tensors, found = restore(place.tier)
    assert found.facts["step"] == 1 and same(tensors, values(1))


def test_data_of_another_step_is_refused(place: Harness) -> None:
    place.save(1)
    place.save(2)
    files = place.files(1)["data"], place.files(2)["data"]
    place.write(files[1], place.read(files[0]))
    tensors, found = restore(place.tier)
    assert same(tensors, values(1)) and found.facts["step"] == 1


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(place: Harness) -> None:
    for step in (1, 2):
        place.save(step)
    for step in (1, 2):
        name = place.files(step)["data"]
        content = bytearray(place.read(name))
        content[4200] ^= 1
        place.write(name, bytes(content))
    with pytest.raises(CheckpointError, match=r"no checkpoint is valid, found 2 damaged: .*found checksum"):
        restore(place.tier)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model/norm": torch.zeros(6)}),
            r"model/norm: found \(5,\) float32, expected \(6,\) float32",
        ),
        (lambda t: t.update({"model/norm": torch.zeros(5).half()}), r"model/norm: found .* expected \(5,\) float16"),
        (lambda t: t.update({"model/more": torch.zeros(5)}), r"model/more: found nothing, expected \(5,\)"),
        (lambda t: t.pop("model/norm"), r"model/norm: found in the checkpoint, not in this model"),
        (lambda t: t.update({f"model/{i}": torch.zeros(1) for i in range(5)}), r"and 2 more\. Give --model"),
    ],
)
def test_another_model_is_refused_and_nothing_is_loaded(place: Harness, change: Callable, message: str) -> None:
    place.save(1)
    tensors = blank()
    change(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        place.tier.load(place.tier.list()[0], tensors)
    assert same(tensors, before)


def test_weights_alone_can_be_read(place: Harness) -> None:
    place.save(1)
    tensors = {name: tensor for name, tensor in blank().items() if name.startswith("model/")}
    place.tier.load(place.tier.list()[0], tensors)
    assert same(tensors, {name: values(1)[name] for name in tensors})


def test_deleted_is_gone(place: Harness) -> None:
    place.save(1)
    place.save(2)
    place.tier.delete(place.tier.list()[0])
    assert [record.step for record in place.tier.list()] == [1]


@pytest.mark.parametrize("name", ["layout", "facts"])
def test_flipped_bit_in_any_file_is_found(durable: Harness, name: str) -> None:
    durable.save(2)
    path = damage(durable, 2, name)
    with pytest.raises(DamagedCheckpoint, match=rf"{path}: found checksum"):
        durable.tier.verify(durable.tier.list()[0])


@pytest.mark.parametrize("where", [i / 10 for i in range(10)])
def test_flipped_bit_in_the_manifest_never_loads_other_values(durable: Harness, where: float) -> None:
    durable.save(1)
    durable.save(2)
    damage(durable, 2, "manifest", where)
    tensors, found = restore(durable.tier)
    assert found.record is not None and same(tensors, values(found.facts["step"]))


def test_same_step_again_replaces_without_touching_the_first_until_whole(
    durable: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.save(5, number=1)
    with monkeypatch.context() as patch:
        patch.setattr("hypershard.checkpoint.durable.Manifest.to_bytes", lambda _: fail())
        with pytest.raises(CheckpointError, match="cut"):
            durable.save(5, number=2)
    assert same(restore(durable.tier)[0], values(1))
    durable.save(5, number=2)
    assert [record.attempt for record in durable.tier.list()] == [2, 1]
    assert same(restore(durable.tier)[0], values(2))


def fail() -> None:
    raise ValueError("cut")


def test_torn_saves_are_removed_by_the_next(durable: Harness) -> None:
    durable.save(2)
    files = durable.files(2)
    durable.write(files["manifest"], None)
    durable.save(3)
    with pytest.raises(Exception, match=r"No such file|NoSuchKey"):
        durable.read(files["data"])


def test_uploads_that_a_killed_job_left_open_are_closed_by_the_next_save(tmp_path: Path, s3_server: Server) -> None:
    harness = S3Harness(tmp_path / "checkpoints", s3_server)
    harness.client.create_multipart_upload(**harness._key(harness.tier.store.where("step-00000003", "__0_0.distcp")))
    other = f"{harness.tier.store.location}0/step-00000003/__0_0.distcp"  # another run, whose name begins alike
    harness.client.create_multipart_upload(**harness._key(other))
    harness.save(7)
    open_uploads = harness.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [f"s3://{BUCKET}/{upload['Key']}" for upload in open_uploads] == [other]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_reader_of_torch_distributed_checkpoint_opens_it(durable: Harness, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    durable.save(4)
    for name in durable.files(4).values():  # as `aws s3 cp --recursive` would
        (tmp_path / name.rpartition("/")[2]).write_bytes(durable.read(name))
    found = blank()
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert same(found, values(4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_is_opened_where_it_lies_in_a_bucket(tmp_path: Path, s3_server: Server) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    harness = S3Harness(tmp_path / "checkpoints", s3_server)
    harness.save(4)
    found = blank()
    reader = FsspecReader(harness.tier.list()[0].location, client_kwargs={"endpoint_url": s3_server.endpoint})
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert same(found, values(4))


def test_delete_removes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = DiskHarness(tmp_path, None)
    harness.save(1)
    monkeypatch.setattr("hypershard.checkpoint.stores.remove_tree", lambda path: fail())
    with pytest.raises(CheckpointError, match="cut"):
        harness.tier.delete(harness.tier.list()[0])
    assert (tmp_path / "step-00000001").exists() and harness.tier.list() == []


def test_refused_write_is_one_sentence_and_older_ones_stay(tmp_path: Path) -> None:
    harness = DiskHarness(tmp_path, None)
    harness.save(1)
    with (
        small_files(),
        pytest.raises(StorageError, match=r"step-00000002.*File too large.* bytes .* are free") as caught,
    ):
        harness.save(2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert same(restore(harness.tier)[0], values(1))


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Let the operating system refuse files over 1 KiB."""
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old_limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_action)


# The second checkpoint does not fit: its tensors, or of those only the small files written after them.
@pytest.mark.parametrize("num_values", [40_000, 30_000])
def test_full_disk_names_directory_and_free_bytes(small_disk: Path, num_values: int) -> None:
    tier = disk(small_disk)
    tensors = {"model/big": torch.arange(num_values, dtype=torch.float32)}
    tier.save(1, take_snapshot(tensors), {}, LINEAGE)
    with pytest.raises(StorageError, match=rf"(?i)writing {small_disk}/step-00000002.*no space left.*\d+ bytes .*free"):
        tier.save(2, take_snapshot({"model/big": tensors["model/big"] + 1}), {}, LINEAGE)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    found = {"model/big": torch.zeros(num_values)}
    assert restore_newest([tier], found).record is not None
    assert same(found, tensors)


def test_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="creating"):
        disk(tmp_path / "file" / "checkpoints").probe()
