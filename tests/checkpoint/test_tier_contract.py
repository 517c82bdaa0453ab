"""What every tier must do. A new tier adds one line to TIERS (and its way of damaging a file, if it has no files)."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import blank, same, values

from hypershard.checkpoint.local import LocalTier
from hypershard.checkpoint.manager import CheckpointManager
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.tier import Tier
from hypershard.errors import CheckpointError, StorageError

TIERS: dict[str, Callable[[Path], Tier]] = {"disk": LocalTier}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return TIERS[request.param](tmp_path / "checkpoints")


def save(tier: Tier, step: int, number: int | None = None) -> Path:
    record = tier.save(step, take_snapshot(values(step if number is None else number)), {"tokens": step * 100})
    return Path(record.location)


def restore(tier: Tier) -> tuple[dict[str, torch.Tensor], dict | None]:
    tensors = blank()
    facts = CheckpointManager(tier, keep=9, asynchronous=False).restore(tensors)
    return tensors, facts


def data_file(directory: Path) -> Path:
    return max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_bit(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def test_round_trip_is_bit_equal(tier: Tier) -> None:
    save(tier, 3)
    tensors, facts = restore(tier)
    assert facts == {"step": 3, "tokens": 300}
    assert same(tensors, values(3))


def test_nothing_saved_is_none(tier: Tier) -> None:
    assert restore(tier)[1] is None


def test_newest_wins_whatever_the_order_of_saving(tier: Tier) -> None:
    for step in (2, 10, 9):
        save(tier, step)
    assert [record.step for record in tier.list()] == [10, 9, 2]
    assert same(restore(tier)[0], values(10))


def test_interrupted_save_is_invisible_and_removed_by_the_next(tier: Tier) -> None:
    save(tier, 1)
    torn = save(tier, 2)
    (torn / "MANIFEST.json").unlink()
    assert [record.step for record in tier.list()] == [1]
    assert restore(tier)[1] == {"step": 1, "tokens": 100}
    save(tier, 3)
    assert not torn.exists()


def test_same_step_again_replaces_without_touching_the_first_until_whole(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tier, 5, number=1)
    with monkeypatch.context() as patch:
        patch.setattr("hypershard.checkpoint.local.write_manifest", lambda *_: fail())
        with pytest.raises(CheckpointError, match="cut"):
            save(tier, 5, number=2)
    assert same(restore(tier)[0], values(1))
    second = save(tier, 5, number=2)
    assert second != first
    assert same(restore(tier)[0], values(2))


def fail() -> None:
    raise ValueError("cut")


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_flipped_bit_is_named_and_the_older_one_used(
    tier: Tier, where: float, caplog: pytest.LogCaptureFixture
) -> None:
    save(tier, 1)
    newest = data_file(save(tier, 2))
    flip_bit(newest, where)
    with pytest.raises(CheckpointError, match=rf"{newest}: found checksum \w+, expected \w+"):
        tier.verify(tier.list()[0])
    tensors, facts = restore(tier)
    assert facts is not None and facts["step"] == 1
    assert same(tensors, values(1))
    assert [record.levelname for record in caplog.records if str(newest) in record.getMessage()] == ["WARNING"]


@pytest.mark.parametrize("name", [".metadata", "facts.json"])
def test_flipped_bit_in_any_file_is_found(tier: Tier, name: str) -> None:
    directory = save(tier, 2)
    flip_bit(directory / name)
    with pytest.raises(CheckpointError, match=rf"{name}: found checksum"):
        tier.verify(tier.list()[0])


@pytest.mark.parametrize("where", [i / 20 for i in range(20)])
def test_flipped_bit_in_the_manifest_never_loads_other_values(tier: Tier, where: float) -> None:
    save(tier, 1)
    flip_bit(save(tier, 2) / "MANIFEST.json", where)
    tensors, facts = restore(tier)
    assert facts is not None and same(tensors, values(facts["step"]))


def test_truncated_and_missing_files_are_named(tier: Tier) -> None:
    truncated = data_file(save(tier, 1))
    size = truncated.stat().st_size
    os.truncate(truncated, size - 7)
    with pytest.raises(CheckpointError, match=rf"{truncated}: found {size - 7} bytes, expected {size}"):
        tier.verify(tier.list()[0])
    truncated.unlink()
    with pytest.raises(CheckpointError, match=rf"{truncated} is missing, expected {size} bytes"):
        tier.verify(tier.list()[0])


def test_data_of_another_step_is_refused(tier: Tier) -> None:
    old, new = save(tier, 1), save(tier, 2)
    data_file(new).write_bytes(data_file(old).read_bytes())
    assert same(restore(tier)[0], values(1))


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tier: Tier) -> None:
    for step in (1, 2):
        flip_bit(data_file(save(tier, step)))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is valid, found 2 damaged: .*step-00000002.*step-00000001"
    ):
        restore(tier)


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
def test_another_model_is_refused_and_nothing_is_loaded(tier: Tier, change: Callable, message: str) -> None:
    save(tier, 1)
    tensors = blank()
    change(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        tier.load(tier.list()[0], tensors)
    assert same(tensors, before)


def test_weights_alone_can_be_read(tier: Tier) -> None:
    save(tier, 1)
    tensors = {name: tensor for name, tensor in blank().items() if name.startswith("model/")}
    tier.load(tier.list()[0], tensors)
    assert same(tensors, {name: values(1)[name] for name in tensors})


def test_delete_removes_the_manifest_first(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tier, 1)
    monkeypatch.setattr("hypershard.checkpoint.local.remove_tree", lambda path: fail())
    with pytest.raises(CheckpointError, match="cut"):
        tier.delete(tier.list()[0])
    assert directory.exists() and tier.list() == []


def test_refused_write_is_one_sentence_and_older_ones_stay(tier: Tier) -> None:
    save(tier, 1)
    with (
        small_files(),
        pytest.raises(StorageError, match=r"step-00000002.*File too large.* bytes .* are free") as caught,
    ):
        save(tier, 2)
    assert "\n" not in str(caught.value)
    assert [Path(record.location).name for record in tier.list()] == ["step-00000001"]
    assert sorted(path.name for path in Path(tier.list()[0].location).parent.iterdir()) == ["step-00000001"]
    assert same(restore(tier)[0], values(1))


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


# The second checkpoint does not fit: its tensors, or of those only the small files written after them.
@pytest.mark.parametrize(("num_values", "refused"), [(40_000, "saving"), (30_000, "writing")])
def test_full_disk_names_directory_and_free_bytes(small_disk: Path, num_values: int, refused: str) -> None:
    tier = LocalTier(small_disk)
    tensors = {"model/big": torch.arange(num_values, dtype=torch.float32)}
    tier.save(1, take_snapshot(tensors), {})
    with pytest.raises(
        StorageError, match=rf"(?i){refused} {small_disk}/step-00000002.*no space left.*\d+ bytes .*free"
    ):
        tier.save(2, take_snapshot({"model/big": tensors["model/big"] + 1}), {})
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    found = {"model/big": torch.zeros(num_values)}
    assert CheckpointManager(tier, keep=1, asynchronous=False).restore(found) is not None
    assert same(found, tensors)


def test_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="creating"):
        LocalTier(tmp_path / "file" / "checkpoints").probe()
