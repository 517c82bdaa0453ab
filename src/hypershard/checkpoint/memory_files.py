"""The memory tier's files of one node: where slots and copies of other nodes lie. Needs no torch.

    <memory_tier_dir>/hypershard-<uid>/<run id>/
        node-id                      random; ranks that read the same one share this memory
        agent.json                   address and token of this node's agent, readable by this user only
        own/rank-00003/slot-0        saves of rank 3, which trains on this node
        copies/rank-00007/slot-1     copies of rank 7's saves, which trains elsewhere

/dev/shm keeps files in memory and outlives every process. All space is claimed by posix_fallocate beforehand: without
it a file grows on first touch, and a full /dev/shm kills the toucher by SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import DamagedCheckpoint, StorageError
from ..log import logger
from ..storage import make_directory, readable_errors
from ..units import format_bytes
from .blob import BlobTable, read_table
from .sums import FileSource

OWN, COPIES = "own", "copies"
BLOB_PATH = re.compile(r"(own|copies)/rank-\d{5,}/(slot-\d+|step-\d{8,}\.blob)")  # all that an agent may serve


def user_folder(directory: Path) -> Path:
    """Where all runs of this user lie below `directory`."""
    return directory / f"hypershard-{os.getuid()}"


def job_root(directory: Path, job: str) -> Path:
    """Folder of one run's files below `directory`, for this user alone."""
    root = user_folder(directory) / job
    with readable_errors(root, "creating"):
        for folder in (root.parent, root):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            # /dev/shm is open to all users: a folder somebody else put there first is not to be trusted.
            if found.st_uid != os.getuid() or folder.is_symlink():
                raise StorageError(f"{folder} belongs to user {found.st_uid}, expected {os.getuid()}; remove it")
            folder.chmod(0o700)
    return root


def rank_folder(root: Path, kind: str, rank: int) -> Path:
    return root / kind / f"rank-{rank:05d}"


def node_id(root: Path) -> str:
    """An id that all processes sharing `root` read alike; the first one makes it."""
    path = root / "node-id"
    with readable_errors(path, "writing"):
        temporary = root / f".node-id.{os.getpid()}"
        temporary.write_text(secrets.token_hex(8))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # atomic: whole or not there, and the first one wins
        temporary.unlink()
        return path.read_text()


def claim(path: Path, size_bytes: int) -> None:
    """Create `path` with all its memory claimed. Raises StorageError with figures when there is not enough."""
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise StorageError(
            f"{path} needs {format_bytes(size_bytes)} of shared memory, found "
            f"{format_bytes(shutil.disk_usage(path.parent).free)} free; enlarge it (containers: --shm-size), choose "
            f"another --memory_tier_dir, or set --in_memory_checkpointing_freq=0",
            shared_by_all_ranks=False,
        ) from error
    finally:
        os.close(descriptor)


def scan(root: Path, tell: Callable[[str], None] = logger.warning) -> Iterator[tuple[Path, BlobTable]]:
    """All finished blobs below `root` and what they say of themselves; `tell` is told of damaged tables."""
    for path in sorted(root.glob("*/rank-*/[!.]*")):  # not what is being written
        try:
            table = _table_of(path)
        except DamagedCheckpoint as error:
            tell(f"{error}; it is passed over")
            continue
        except OSError:  # deleted since it was listed
            continue
        if table is not None:
            yield path, table


def _table_of(path: Path) -> BlobTable | None:
    try:
        return read_table(FileSource(path))
    except DamagedCheckpoint:
        # A job that began to write it anew between the head and the table has zeroed the head by now.
        return read_table(FileSource(path))
