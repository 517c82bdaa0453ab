"""Files as the rest of the program needs them: whole or not at all, with the disk's refusals made readable.

A path is a local path. Writers go through a temporary neighbour, `fsync` and `rename`, so a reader
never sees half a file, whatever dies when.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import StorageError
from .log import logger


def local_path(location: str | os.PathLike[str], *, flag: str) -> Path:
    """The path named by `location`, `~` expanded. `s3://` and other URIs are refused, naming `flag`."""
    text = os.fspath(location)
    if "://" in text:
        scheme = text.split("://", 1)[0]
        raise StorageError(f"{flag}={text}: this flag takes a path on a local or shared disk, found a {scheme}:// URI")
    return Path(text).expanduser()


@contextlib.contextmanager
def readable_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's refusal while `doing` something to `path` into one clear StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = (
                f"no space left on the disk ({_free_bytes(path)} bytes free); free some or choose another directory"
            )
        else:
            reason = error.strerror or str(error)
        raise StorageError(f"{doing} {path}: {reason}", shared_by_all_ranks=False) from error


def _free_bytes(path: Path) -> int | str:
    for candidate in (path, *path.parents):
        if candidate.exists():
            return shutil.disk_usage(candidate).free
    return "unknown"


def make_directory(path: Path) -> Path:
    """Create `path` with its parents; being there already is fine."""
    with readable_errors(path, "creating"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write the whole file or nothing; what is there after a crash is the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with readable_errors(path, "writing"), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with readable_errors(path, "writing"):
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file. A damaged file raises ValueError, a missing one FileNotFoundError."""
    return json.loads(path.read_bytes())


def sync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a directory; being gone already is fine."""
    with readable_errors(path, "deleting"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def exclusive(path: Path, *, doing: str) -> Iterator[None]:
    """Be the only process `doing` something, on all machines that share the disk: the one that holds the file `path`.

    Waits for another that does. A lock ends with the process that holds it, however it ends; then the file is gone.
    On a file system without locks a warning says so, and that is all. StorageError: the file cannot be made.
    """
    with readable_errors(path, "locking"):
        descriptor = _hold(path, doing)
    try:
        yield
    finally:
        # Deleted while it is held: who waited for this file finds that it is gone and takes a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _hold(path: Path, doing: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(descriptor, path, doing)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:  # an interrupt too, while it waits: nobody else knows of the descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, doing: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info(f"another process is {doing}; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning(f"{path.parent} is on a file system without locks: let one process at a time be {doing}")
