"""Blobs that lie on this node, in its memory or on its own disk, seen from outside of any job. Needs no torch.

Nothing is created here, and nothing is deleted that a living process may still need.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedCheckpoint, StorageError
from ..storage import readable_errors
from .agent_client import LOCK_FILE
from .blob import BlobTable, blob_damage, read_table
from .lineage import Lineage
from .memory_files import scan, user_folder
from .sums import FileSource, Source

_RUN_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
# A job that comes back reads its blobs before it maps them; its folder was touched when it opened it.
RECENT_SECONDS = 3600.0


@dataclass(frozen=True)
class Blob:
    path: Path
    table: BlobTable

    @property
    def source(self) -> FileSource:
        return FileSource(self.path)

    def is_still_there(self) -> bool:
        """Whether it is the same blob; a running job writes its slots anew, head first."""
        try:
            return read_table(self.source) == self.table
        except (DamagedCheckpoint, OSError):
            return False

    def damage(self, source: Source) -> str | None:
        """What is wrong with the blob as `source` reads it; None when all is as saved."""
        return blob_damage(source, self.table)


@dataclass(frozen=True)
class BlobSet:
    """The blobs on this node of one save of one run. Of a job of several nodes, others hold the rest."""

    tier: str
    run: str
    lineage: Lineage
    step: int
    blobs: tuple[Blob, ...]

    @property
    def name(self) -> str:
        return f"{self.tier} step {self.step} (start {self.lineage.generation})"

    @property
    def num_parts(self) -> int:
        return self.blobs[0].table.num_parts

    @property
    def parts(self) -> dict[int, Blob]:
        """One blob of each part that is here."""
        return {blob.table.part: blob for blob in reversed(self.blobs)}

    @property
    def is_whole(self) -> bool:
        return self.parts.keys() >= set(range(self.num_parts))

    @property
    def size_bytes(self) -> int:
        """Of the parts here, each counted once."""
        return sum(blob.table.size_bytes for blob in self.parts.values())

    @property
    def saved_at(self) -> str:
        return max(blob.table.saved_at for blob in self.blobs)


@dataclass(frozen=True)
class NodeBlobs:
    """All finished blobs of one run in one tier of this node, newest first, and what is damaged beyond recognition."""

    sets: tuple[BlobSet, ...]
    damage: tuple[str, ...]


def run_root(directory: Path, run: str) -> Path | None:
    """The folder of a run's blobs below `directory` (a tier's), as `memory_files.job_root` makes it; None: not there.

    Raises StorageError when it is another user's, or `run` is no run's id.
    """
    if not _RUN_ID.fullmatch(run):
        raise StorageError(f"found {run!r} as the id of a run, expected letters and digits")
    root = user_folder(directory) / run
    for folder in (root.parent, root):
        try:
            found = folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found.st_uid != os.getuid() or folder.is_symlink():
            raise StorageError(f"{folder} belongs to user {found.st_uid}, expected {os.getuid()}; it is not read")
    return root


def blobs_below(root: Path, *, tier: str, run: str) -> NodeBlobs:
    """The blobs of `run` that are below `root` now."""
    held: dict[tuple[Lineage, int], list[Blob]] = {}
    damage: list[str] = []
    for path, table in scan(root, damage.append):
        if table.job == run:
            held.setdefault((table.lineage, table.step), []).append(Blob(path, table))
    sets = [
        BlobSet(tier, run, lineage, step, tuple(blobs)) for (lineage, step), blobs in sorted(held.items(), reverse=True)
    ]
    return NodeBlobs(tuple(sets), tuple(damage))


@dataclass(frozen=True)
class RunMemory:
    """What one run holds in this node's memory. `needed_by` says who may need it; None: nobody that is seen here."""

    root: Path
    size_bytes: int
    newest_step: int | None
    seconds_since_use: float
    needed_by: str | None

    @property
    def run(self) -> str:
        return self.root.name


def runs_in(directory: Path) -> list[RunMemory]:
    """All of this user's runs with files below `directory` (--memory_tier_dir)."""
    user_root = user_folder(directory)
    if not user_root.is_dir():
        return []
    mapped = _mapped_files()
    roots = [path for path in sorted(user_root.iterdir()) if _RUN_ID.fullmatch(path.name)]
    return [_look_at(root, mapped) for root in roots if run_root(directory, root.name) is not None]


def forget_run(memory: RunMemory) -> bool:
    """Delete a run's files in this node's memory, unless a process has come to need them meanwhile."""
    if _user_of(memory.root, _mapped_files()) is not None:
        return False
    with readable_errors(memory.root, "deleting"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(memory.root)
    return True


def _look_at(root: Path, mapped: dict[str, int]) -> RunMemory:
    size_bytes, last_use = 0, root.stat().st_ctime
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            size_bytes += found.st_blocks * 512  # POSIX counts blocks of 512 bytes, whatever the file system
            last_use = max(last_use, found.st_ctime)
    sets = blobs_below(root, tier="memory", run=root.name).sets
    idle_seconds = max(0.0, time.time() - last_use)
    return RunMemory(root, size_bytes, sets[0].step if sets else None, idle_seconds, _user_of(root, mapped))


def _user_of(root: Path, mapped: dict[str, int]) -> str | None:
    inside = f"{root.resolve()}/"
    for path, process in mapped.items():
        if path.startswith(inside):
            return f"process {process} has it mapped"
    return "its agent is alive" if _agent_lives(root) else None


def _agent_lives(root: Path) -> bool:
    """Whether a process holds the lock that an agent holds as long as it lives."""
    try:
        descriptor = os.open(root / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _mapped_files() -> dict[str, int]:
    """Files that processes of this user have mapped, and one process each, as Linux shows them in /proc."""
    found: dict[str, int] = {}
    for process, path in _maps():
        found.setdefault(path, process)
    return found


def _maps() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "maps").read_text(errors="surrogateescape").splitlines()
        except OSError:  # gone, or another user's, who cannot open what is ours
            continue
        for line in lines:
            # address perms offset dev inode path
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                yield int(folder.name), fields[5]
