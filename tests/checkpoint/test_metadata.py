from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import disk, values

from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import METADATA, StoredCheckpoint, find_place
from hypershard.checkpoint.metadata import read_metadata
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import MANIFEST
from hypershard.checkpoint.sums import sum_of
from hypershard.errors import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(disk(tmp_path).save(1, take_snapshot(values(1)), {}, Lineage(1, "first")).location)


def stored(directory: Path) -> StoredCheckpoint:
    return find_place(str(directory)).finished()[0]


def change_layout(directory: Path, content: bytes) -> None:
    """Put `content` where the layout is, with a manifest to match: only what it says may refuse it then."""
    (directory / METADATA).write_bytes(content)
    manifest = stored(directory).manifest()
    manifest.files[METADATA] = sum_of(content)
    (directory / MANIFEST).write_bytes(manifest.to_bytes())


def read(directory: Path):
    found = stored(directory)
    return read_metadata(found, found.manifest())


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
    change_layout(directory, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it names posix\.mkdir"):
        read(directory)
    assert not proof.exists()
    pickle.loads((directory / METADATA).read_bytes())
    assert proof.exists(), "the test's own pickle must be harmful, or it shows nothing"


@pytest.mark.parametrize("name", ["load", "save", "ops.create", "hub.load", "Tensor", "float32.__class__"])
def test_other_names_of_torch_are_refused(directory: Path, name: str) -> None:
    change_layout(directory, b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(CheckpointError, match="is refused"):
        read(directory)


def test_valid_checksum_does_not_make_a_harmful_layout_valid(directory: Path, tmp_path: Path) -> None:
    change_layout(directory, pickle.dumps(Harmful(tmp_path / "executed")))
    tier = disk(directory.parent)
    with pytest.raises(CheckpointError, match="is refused"):
        tier.verify(tier.list()[0])
    assert not (tmp_path / "executed").exists()


def test_data_outside_the_checkpoint_is_refused(directory: Path) -> None:
    metadata = as_torch_reads(directory)
    next(iter(metadata.storage_data.values())).relative_path = "../other/__0_0.distcp"
    change_layout(directory, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"lies in '\.\./other/__0_0\.distcp', which the manifest does not list"):
        read(directory)


def test_tensor_without_data_is_refused(directory: Path) -> None:
    metadata = as_torch_reads(directory)
    metadata.storage_data.popitem()
    change_layout(directory, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="was never written"):
        read(directory)


def test_something_else_than_a_layout_is_refused(directory: Path) -> None:
    change_layout(directory, pickle.dumps(torch.float32))
    with pytest.raises(CheckpointError, match="found dtype, expected a layout"):
        read(directory)
    change_layout(directory, b"")
    with pytest.raises(CheckpointError, match="cannot be read: EOFError"):
        read(directory)
