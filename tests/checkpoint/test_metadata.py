from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import values

from hypershard.checkpoint.local import LocalTier
from hypershard.checkpoint.manifest import METADATA, read_manifest, sum_file, write_manifest
from hypershard.checkpoint.metadata import read_metadata
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.errors import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(LocalTier(tmp_path).save(1, take_snapshot(values(1)), {}).location)


def read(directory: Path):
    return read_metadata(directory, files=read_manifest(directory).files)


def test_layout_equals_what_torch_reads(directory: Path) -> None:
    found, expected = read(directory), as_torch_reads(directory)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data


def as_torch_reads(directory: Path):
    """The layout for a test to change and write back; ours was just written, so unpickling it is safe."""
    return pickle.loads((directory / METADATA).read_bytes())


class Harmful:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_code_in_the_layout_is_refused_and_not_run(directory: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    metadata = as_torch_reads(directory)
    metadata.planner_data = Harmful(proof)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names posix\.mkdir"):
        read(directory)
    assert not proof.exists()
    pickle.loads((directory / METADATA).read_bytes())
    assert proof.exists(), "the test's own pickle must be harmful, or it shows nothing"


@pytest.mark.parametrize("name", ["load", "save", "ops.create", "hub.load", "Tensor", "float32.__class__"])
def test_other_names_of_torch_are_refused(directory: Path, name: str) -> None:
    (directory / METADATA).write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(CheckpointError, match="is refused"):
        read(directory)


def test_valid_checksum_does_not_make_a_harmful_layout_valid(directory: Path, tmp_path: Path) -> None:
    (directory / METADATA).write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    manifest = read_manifest(directory)
    manifest.files[METADATA] = sum_file(directory / METADATA)
    write_manifest(directory, manifest)
    tier = LocalTier(directory.parent)
    with pytest.raises(CheckpointError, match="is refused"):
        tier.verify(tier.list()[0])
    assert not (tmp_path / "executed").exists()


def test_data_outside_the_checkpoint_is_refused(directory: Path) -> None:
    metadata = as_torch_reads(directory)
    next(iter(metadata.storage_data.values())).relative_path = "../other/__0_0.distcp"
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"lies in '\.\./other/__0_0\.distcp', which the manifest does not list"):
        read(directory)


def test_tensor_without_data_is_refused(directory: Path) -> None:
    metadata = as_torch_reads(directory)
    metadata.storage_data.popitem()
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="was never written"):
        read(directory)


def test_something_else_than_a_layout_is_refused(directory: Path) -> None:
    (directory / METADATA).write_bytes(pickle.dumps(torch.float32))
    with pytest.raises(CheckpointError, match="found dtype, expected a layout"):
        read(directory)
    (directory / METADATA).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read: EOFError"):
        read(directory)
