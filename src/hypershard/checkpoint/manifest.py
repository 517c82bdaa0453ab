"""The manifest of a checkpoint directory: what was saved, byte for byte. Needs no torch.

    <checkpoint_dir>/step-00000060/
        __R_0.distcp     rank R's tensors           .metadata   where each tensor lies (torch.distributed.checkpoint)
        facts.json       step, samples, model ...   MANIFEST.json   sizes and checksums of all the others

The manifest is written last and removed first, so it is there exactly when the checkpoint is whole.
torch.distributed.checkpoint has no checksums of its own: one flipped bit would load as a wrong weight.
"""

from __future__ import annotations

import datetime
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage import read_json, write_json
from .tier import CheckpointRecord

FORMAT_VERSION = 1
MANIFEST, FACTS, METADATA = "MANIFEST.json", "facts.json", ".metadata"
_PIECE_BYTES = 16 * 2**20
# step-00000060, and step-00000060.2 for the second save of that step
_DIRECTORY_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and CRC-32 (zlib's, 8 hexadecimal digits) of one file."""

    size_bytes: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST.json holds. `saved_at` is UTC in ISO 8601; `files` maps each other file's name to its sum."""

    step: int
    saved_at: str
    world_size: int
    torch_version: str
    files: dict[str, FileSum]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


def directory_name(step: int, attempt: int) -> str:
    return f"step-{step:08d}" + (f".{attempt}" if attempt > 1 else "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def sum_file(path: Path) -> FileSum:
    """Read `path` and sum it up."""
    crc, size_bytes, piece = 0, 0, bytearray(_PIECE_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            crc = zlib.crc32(memoryview(piece)[:count], crc)
            size_bytes += count
    return FileSum(size_bytes, f"{crc:08x}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    files = {name: {"size_bytes": file.size_bytes, "crc32": file.crc32} for name, file in manifest.files.items()}
    value = {
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "saved_at": manifest.saved_at,
        "world_size": manifest.world_size,
        "torch_version": manifest.torch_version,
        "files": files,
    }
    write_json(directory / MANIFEST, value)


def read_manifest(directory: Path) -> Manifest:
    """The manifest in a checkpoint directory. Raises CheckpointError when it is missing or makes no sense."""
    path = directory / MANIFEST
    try:
        value: Any = read_json(path)
        version = value["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: found format_version {version!r}, expected {FORMAT_VERSION}")
        files = {name: FileSum(int(file["size_bytes"]), str(file["crc32"])) for name, file in value["files"].items()}
        manifest = Manifest(
            int(value["step"]), str(value["saved_at"]), int(value["world_size"]), str(value["torch_version"]), files
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    _check_names(path, manifest, directory)
    return manifest


def _check_names(path: Path, manifest: Manifest, directory: Path) -> None:
    for name in (METADATA, FACTS):
        if name not in manifest.files:
            raise CheckpointError(f"{path} is damaged: it does not list {name}")
    for name in manifest.files:
        if "/" in name or os.sep in name or name in (".", ".."):
            raise CheckpointError(f"{path} lists {name!r}, expected plain file names")
    match = _DIRECTORY_NAME.fullmatch(directory.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"{path} is damaged: found step {manifest.step}, expected {int(match[1])}")


def damage_of(path: Path, expected: FileSum, *, checksum: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint, or None. Without `checksum` only its size is compared."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes != expected.size_bytes:
            return f"{path}: found {size_bytes} bytes, expected {expected.size_bytes}"
        if checksum and (found := sum_file(path)) != expected:
            return f"{path}: found checksum {found.crc32}, expected {expected.crc32}"
    except FileNotFoundError:
        return f"{path} is missing, expected {expected.size_bytes} bytes"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts saved beside the tensors. Raises CheckpointError when they cannot be read."""
    try:
        facts = read_json(directory / FACTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / FACTS} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{directory / FACTS}: found {type(facts).__name__}, expected an object")
    return facts


def step_directories(directory: Path) -> list[CheckpointRecord]:
    """All step directories, whole or not, newest first; a missing `directory` has none."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _DIRECTORY_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(CheckpointRecord(int(match[1]), str(path), int(match[2] or 1)))
    return sorted(found, key=lambda record: (record.step, record.attempt), reverse=True)


def is_finished(record: CheckpointRecord) -> bool:
    return (Path(record.location) / MANIFEST).exists()


def complete_checkpoints(directory: Path) -> list[CheckpointRecord]:
    """Checkpoints with a manifest in `directory`, newest first. A step directory itself stands for itself alone.

    Raises CheckpointError for a step directory that was never finished, since it was asked for by name.
    """
    match = _DIRECTORY_NAME.fullmatch(directory.name)
    if match and directory.is_dir():
        own = CheckpointRecord(int(match[1]), str(directory), int(match[2] or 1))
        if not is_finished(own):
            raise CheckpointError(f"{directory} has no {MANIFEST}: the checkpoint was never finished")
        return [own]
    return [record for record in step_directories(directory) if is_finished(record)]


def checkpoint_directory(path: Path) -> Path:
    """Where the checkpoints are: `path` itself, or its `checkpoints/` when `path` is a run directory."""
    inner = path / "checkpoints"
    return inner if inner.is_dir() and not step_directories(path) else path
