"""Where directories of checkpoint files lie: on a disk that all ranks share, or in a bucket. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import StorageError
from ..s3 import S3, AlreadyExists, Deadline, S3Uri
from ..storage import make_directory, readable_errors, remove_tree, sync_directory, write_bytes
from ..units import format_bytes
from .sums import BLOCK_BYTES, FileSource, Source

MANIFEST = "MANIFEST.json"
RUN_FILE = "run-id"  # which run a place belongs to, beside its checkpoints
# A request to a bucket for a listing or a small object; large objects have their checkpoint's own limit.
_SMALL_SECONDS = 120.0


class Store(Protocol):
    """A place that holds folders of files. Not collective: what a rank asks, it alone asks."""

    @property
    def name(self) -> str:
        """The tier's name in logs, and what `checkpoint list` shows."""

    @property
    def location(self) -> str:
        """A path or URI."""

    @property
    def is_remote(self) -> bool:
        """Whether it may be out of reach for a while without anybody's fault."""

    def where(self, folder: str, name: str = "") -> str:
        """The path or URI of a folder, or of a file in it."""

    def contents(self) -> dict[str, dict[str, int]]:
        """Folder -> file name -> size in bytes. Folders may be half written."""

    def make(self, folder: str) -> None: ...

    def stream(self, folder: str, name: str, *, seconds: float | None) -> AbstractContextManager[Any]:
        """A file to `write` to, of which nothing is seen if the block raises. `seconds` limits it, if it is remote."""

    def write(self, folder: str, name: str, content: bytes, *, is_new: bool = False) -> None:
        """Write a small file whole or not at all; with `is_new` one that is there already is an error."""

    def read(self, folder: str, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def source(self, folder: str, name: str) -> Source: ...

    def settle(self, folder: str) -> None:
        """Make what was written survive a power cut, before the manifest says that it is there."""

    def files(self, folder: str) -> dict[str, int]:
        """File name -> size in bytes of one folder, which need not exist; '' is the store itself."""

    def delete(self, folder: str, name: str) -> None:
        """Delete one file; being gone already is fine."""

    def remove(self, folder: str) -> None:
        """Delete a folder, its manifest first."""

    def probe(self) -> str:
        """Write and leave a file, so that others can look for it; returns its name. Raises StorageError."""

    def sees(self, probe: str) -> bool: ...

    def end_probe(self, probe: str) -> None: ...

    def room(self, size_bytes: int) -> str:
        """For an error: how much room there is for this rank's `size_bytes`, and which flag names the place."""


def run_of(store: Store) -> str | None:
    """The id of the run that saves to `store`; None when it holds none. Raises StorageError."""
    try:
        return store.read("", RUN_FILE).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise StorageError(f"{store.location} holds a damaged {RUN_FILE}: {error}") from error


@dataclass(frozen=True)
class DiskStore:
    """A directory on a disk that all ranks share."""

    directory: Path
    name: str = "disk"
    is_remote: bool = False

    @property
    def location(self) -> str:
        return str(self.directory)

    def where(self, folder: str, name: str = "") -> str:
        return str(self.directory / folder / name) if name else str(self.directory / folder)

    def contents(self) -> dict[str, dict[str, int]]:
        if not self.directory.is_dir():
            return {}
        found: dict[str, dict[str, int]] = {}
        with readable_errors(self.directory, "listing"):
            for folder in self.directory.iterdir():
                # Another rank may be deleting: what is gone between listing and looking is not there.
                with contextlib.suppress(FileNotFoundError):
                    if folder.is_dir():
                        found[folder.name] = {path.name: path.stat().st_size for path in folder.iterdir()}
        return found

    def make(self, folder: str) -> None:
        path = make_directory(self.directory) / folder
        with readable_errors(path, "creating"):
            path.mkdir()

    @contextlib.contextmanager
    def stream(self, folder: str, name: str, *, seconds: float | None) -> Iterator[_Whole]:
        path = self.directory / folder / name
        with readable_errors(path, "writing"), open(path, "wb", buffering=0) as file:
            yield _Whole(file)
            os.fsync(file.fileno())

    def write(self, folder: str, name: str, content: bytes, *, is_new: bool = False) -> None:
        path = self.directory / folder / name
        if is_new and path.exists():
            raise StorageError(f"{path} is there already: two jobs write to --checkpoint_dir={self.directory}")
        make_directory(path.parent)
        write_bytes(path, content)

    def read(self, folder: str, name: str) -> bytes:
        path = self.directory / folder / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error

    def source(self, folder: str, name: str) -> Source:
        return FileSource(self.directory / folder / name)

    def settle(self, folder: str) -> None:
        with readable_errors(self.directory / folder, "writing"):
            sync_directory(self.directory / folder)
            sync_directory(self.directory)

    def files(self, folder: str) -> dict[str, int]:
        path = self.directory / folder
        with readable_errors(path, "listing"), contextlib.suppress(FileNotFoundError):
            return {str(one.relative_to(path)): one.stat().st_size for one in path.rglob("*") if one.is_file()}
        return {}

    def delete(self, folder: str, name: str) -> None:
        path = self.directory / folder / name
        with readable_errors(path, "deleting"):
            path.unlink(missing_ok=True)

    def remove(self, folder: str) -> None:
        path = self.directory / folder
        with readable_errors(path, "deleting"), contextlib.suppress(FileNotFoundError):
            (path / MANIFEST).unlink(missing_ok=True)
            sync_directory(path)
        remove_tree(path)

    def probe(self) -> str:
        name = f".probe-{uuid.uuid4().hex}"
        write_bytes(make_directory(self.directory) / name, b"")
        return name

    def sees(self, probe: str) -> bool:
        return (self.directory / probe).exists()

    def end_probe(self, probe: str) -> None:
        (self.directory / probe).unlink(missing_ok=True)

    def room(self, size_bytes: int) -> str:
        try:
            free_bytes = shutil.disk_usage(self.directory).free
        except OSError:
            return f"check --checkpoint_dir={self.directory}"
        return (
            f"{free_bytes} bytes ({format_bytes(free_bytes)}) are free in {self.directory} and this rank writes about "
            f"{format_bytes(size_bytes)}; free some space or choose another --checkpoint_dir"
        )


class _Whole:
    """An unbuffered file whose `write` writes all it is given."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < view.nbytes:
            written += self._file.write(view[written:])
        return written


@dataclass(frozen=True)
class S3Source:
    """An object in a bucket."""

    client: S3
    uri: S3Uri
    parallel_reads: int = 8  # one connection carries some 100 MB/s

    @property
    def name(self) -> str:
        return str(self.uri)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return self.client.read_range(self.uri, offset, size_bytes, deadline=Deadline.after(_SMALL_SECONDS))


@dataclass(frozen=True)
class S3Store:
    """A prefix in a bucket."""

    uri: S3Uri
    client: S3
    name: str = "s3"
    is_remote: bool = True

    @property
    def location(self) -> str:
        return str(self.uri)

    def where(self, folder: str, name: str = "") -> str:
        return str(self.uri / folder / name) if name else str(self.uri / folder)

    def _uri(self, folder: str, name: str) -> S3Uri:
        return self.uri / folder / name if folder else self.uri / name

    def contents(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for key, size_bytes in self.client.list_objects(self.uri, deadline=_soon()).items():
            folder, _, name = key.partition("/")
            if name:
                found.setdefault(folder, {})[name] = size_bytes
        return found

    def make(self, folder: str) -> None:
        """A bucket has no folders. What earlier, torn saves left open is closed: only one runs at a time here."""
        self.client.abort_uploads(self.uri, deadline=_soon())

    def stream(self, folder: str, name: str, *, seconds: float | None) -> AbstractContextManager[Any]:
        deadline = Deadline.after(seconds if seconds is not None else 24 * 3600.0)
        return self.client.open_write(self._uri(folder, name), deadline=deadline, part_bytes=BLOCK_BYTES)

    def write(self, folder: str, name: str, content: bytes, *, is_new: bool = False) -> None:
        uri = self._uri(folder, name)
        try:
            self.client.put(uri, content, deadline=_soon(), only_if_absent=is_new)
        except AlreadyExists as error:
            # A put whose answer was lost is sent again and finds itself.
            if self.client.read(uri, deadline=_soon()) != content:
                raise StorageError(f"{error}: two jobs write to --s3_tier_base_path={self.uri}") from error

    def read(self, folder: str, name: str) -> bytes:
        return self.client.read(self._uri(folder, name), deadline=_soon())

    def source(self, folder: str, name: str) -> Source:
        return S3Source(self.client, self._uri(folder, name))

    def settle(self, folder: str) -> None:
        """S3 answers when an object is safe."""

    def files(self, folder: str) -> dict[str, int]:
        return self.client.list_objects(self.uri / folder if folder else self.uri, deadline=_soon())

    def delete(self, folder: str, name: str) -> None:
        self.client.delete([self._uri(folder, name)], deadline=_soon())

    def remove(self, folder: str) -> None:
        self.client.delete([self.uri / folder / MANIFEST], deadline=_soon())
        self.client.abort_uploads(self.uri / folder, deadline=_soon())
        names = self.client.list_objects(self.uri / folder, deadline=_soon())
        self.client.delete([self.uri / folder / name for name in names], deadline=_soon())

    def probe(self) -> str:
        name = f".probe-{uuid.uuid4().hex}"
        self.client.put(self.uri / name, b"", deadline=_soon())
        return name

    def sees(self, probe: str) -> bool:
        try:
            self.client.read(self.uri / probe, deadline=_soon())
        except FileNotFoundError:
            return False
        return True

    def end_probe(self, probe: str) -> None:
        self.client.delete([self.uri / probe], deadline=_soon())

    def room(self, size_bytes: int) -> str:
        return f"this rank uploads about {format_bytes(size_bytes)} to --s3_tier_base_path={self.uri}"


def _soon() -> Deadline:
    return Deadline.after(_SMALL_SECONDS)


def open_store(location: str) -> DiskStore | S3Store:
    """The store that a path or an s3:// URI names."""
    if location.startswith("s3://"):
        return S3Store(S3Uri.parse(location), S3())
    return DiskStore(Path(location).expanduser())
