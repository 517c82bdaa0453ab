"""A stored checkpoint: a folder of files and the manifest that says what they are, byte for byte. Needs no torch.

    <place>/step-00000060/
        __R_0.distcp     rank R's tensors           .metadata   where each tensor lies (torch.distributed.checkpoint)
        facts.json       step, samples, model ...   MANIFEST.json   sizes and checksums of all the others

The manifest is written last and removed first, so it is there exactly when the checkpoint is whole.
torch.distributed.checkpoint has no checksums of its own: one flipped bit would load as a wrong weight.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, DamagedCheckpoint
from .lineage import UNREADABLE, Lineage
from .stores import MANIFEST, DiskStore, Store, open_store
from .sums import FileSum, damage_of, read_verified
from .tier import CheckpointRecord

FORMAT_VERSION = 2
FACTS, METADATA = "facts.json", ".metadata"
# step-00000060, and step-00000060.2 for the second save of that step
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST.json holds. `saved_at` is UTC in ISO 8601; `files` maps each other file's name to its sum."""

    step: int
    lineage: Lineage
    saved_at: str
    world_size: int
    torch_version: str
    files: dict[str, FileSum]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def to_bytes(self) -> bytes:
        value = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "lineage": vars(self.lineage),
            "saved_at": self.saved_at,
            "world_size": self.world_size,
            "torch_version": self.torch_version,
            "files": {name: file.to_json() for name, file in self.files.items()},
        }
        return (json.dumps(value, indent=1) + "\n").encode()


@dataclass(frozen=True)
class StoredCheckpoint:
    """One folder in a store, whole or not. `files` are the sizes found when it was listed."""

    store: Store
    folder: str
    step: int
    attempt: int
    files: dict[str, int]

    @property
    def location(self) -> str:
        return self.store.where(self.folder)

    @property
    def is_finished(self) -> bool:
        return MANIFEST in self.files

    @property
    def record(self) -> CheckpointRecord:
        """Raises StorageError when the manifest cannot be fetched; a damaged one sorts first and fails when read."""
        try:
            return CheckpointRecord(self.step, self.location, self.attempt, self.manifest().lineage)
        except CheckpointError:
            return CheckpointRecord(self.step, self.location, self.attempt, UNREADABLE)

    def manifest(self) -> Manifest:
        """Raises DamagedCheckpoint when it is missing or makes no sense."""
        where = self.store.where(self.folder, MANIFEST)
        try:
            return _parse(json.loads(self.store.read(self.folder, MANIFEST)), where, self.step)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{where} is missing: the checkpoint was never finished") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{where} is damaged: {type(error).__name__}: {error}") from error

    def small_file(self, manifest: Manifest, name: str) -> bytes:
        """The checked content of one file. Raises DamagedCheckpoint."""
        expected = manifest.files[name]
        source = self.store.source(self.folder, name)
        try:
            (content,) = read_verified(source, expected, [(0, expected.size_bytes)])
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{source.name} is missing, expected {expected.size_bytes} bytes") from None
        return bytes(content)

    def facts(self, manifest: Manifest) -> dict[str, Any]:
        """The facts saved beside the tensors. Raises DamagedCheckpoint."""
        where = self.store.where(self.folder, FACTS)
        try:
            facts = json.loads(self.small_file(manifest, FACTS))
        except ValueError as error:
            raise DamagedCheckpoint(f"{where} cannot be read: {error}") from error
        if not isinstance(facts, dict):
            raise DamagedCheckpoint(f"{where}: found {type(facts).__name__}, expected an object")
        return facts

    def damage(self, manifest: Manifest, name: str) -> str | None:
        """What is wrong with one file, or None when every byte is as saved."""
        return self.wrong_size(manifest, name) or damage_of(self.store.source(self.folder, name), manifest.files[name])

    def wrong_size(self, manifest: Manifest, name: str) -> str | None:
        """What is wrong with the size of one file, by the listing."""
        expected, found = manifest.files[name].size_bytes, self.files.get(name)
        where = self.store.where(self.folder, name)
        if found is None:
            return f"{where} is missing, expected {expected} bytes"
        return None if found == expected else f"{where}: found {found} bytes, expected {expected}"


def _parse(value: Any, where: str, step: int) -> Manifest:
    version = value["format_version"]
    if version != FORMAT_VERSION:
        raise DamagedCheckpoint(f"{where}: found format_version {version!r}, expected {FORMAT_VERSION}")
    manifest = Manifest(
        step=int(value["step"]),
        lineage=Lineage(int(value["lineage"]["generation"]), str(value["lineage"]["id"])),
        saved_at=str(value["saved_at"]),
        world_size=int(value["world_size"]),
        torch_version=str(value["torch_version"]),
        files={name: FileSum.from_json(file) for name, file in value["files"].items()},
    )
    for name in (METADATA, FACTS):
        if name not in manifest.files:
            raise DamagedCheckpoint(f"{where} is damaged: it does not list {name}")
    for name in manifest.files:
        if "/" in name or os.sep in name or name in (".", ".."):
            raise DamagedCheckpoint(f"{where} lists {name!r}, expected plain file names")
    if manifest.step != step:
        raise DamagedCheckpoint(f"{where} is damaged: found step {manifest.step}, expected {step}")
    return manifest


def folder_name(step: int, attempt: int) -> str:
    return f"step-{step:08d}" + (f".{attempt}" if attempt > 1 else "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def stored_checkpoints(store: Store) -> list[StoredCheckpoint]:
    """All step folders of a store, whole or not, newest first."""
    found = []
    for folder, files in store.contents().items():
        if match := _FOLDER.fullmatch(folder):
            found.append(StoredCheckpoint(store, folder, int(match[1]), int(match[2] or 1), files))
    return sorted(found, key=lambda stored: (stored.step, stored.attempt), reverse=True)


@dataclass(frozen=True)
class Place:
    """A store, or with `folder` just one checkpoint in it."""

    store: Store
    folder: str | None = None

    def stored(self) -> list[StoredCheckpoint]:
        """Its checkpoints, whole or not, newest first."""
        return [stored for stored in stored_checkpoints(self.store) if self.folder in (None, stored.folder)]

    def finished(self) -> list[StoredCheckpoint]:
        """Its whole checkpoints, newest first. Raises CheckpointError when the one asked for was never finished."""
        stored = self.stored()
        if self.folder is not None and stored and not stored[0].is_finished:
            raise CheckpointError(f"{stored[0].location} has no {MANIFEST}: the checkpoint was never finished")
        return [one for one in stored if one.is_finished]


def find_place(location: str) -> Place:
    """What a path or URI names: a folder of checkpoints, one checkpoint, or a run directory with `checkpoints/`."""
    text = location.rstrip("/")
    parent, _, last = text.rpartition("/")
    if _FOLDER.fullmatch(last):
        return Place(open_store(parent or "."), last)
    store = open_store(text)
    if isinstance(store, DiskStore):
        inner = store.directory / "checkpoints"
        if inner.is_dir() and not stored_checkpoints(store):
            return Place(DiskStore(inner))
    return Place(store)


def existing_place(location: str) -> Place:
    """The same, but a path that is no directory is an error."""
    place = find_place(location)
    if isinstance(place.store, DiskStore):
        path = place.store.directory / (place.folder or "")
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory; expected a run or checkpoint directory, or an s3:// URI")
    return place
