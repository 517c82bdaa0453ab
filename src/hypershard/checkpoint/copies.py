"""The files an agent keeps: slots for copies of other nodes' blobs, and what may be read of them. Needs no torch.

    copies/rank-00007/slot-0, slot-1    where copies of rank 7's blobs go in turn
    copies/rank-00007/slot-2, ...       slots of another size, of an earlier start, until both of those hold a blob

All state is in the files, so an agent that takes over from a killed one finds what that one knew.
"""

from __future__ import annotations

import mmap
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamagedCheckpoint, StorageError
from ..storage import readable_errors
from ..units import format_bytes
from .blob import HEAD_BYTES, NO_HEAD, BlobTable, blob_bytes, read_table
from .lineage import Lineage
from .memory_files import BLOB_PATH, COPIES, claim, rank_folder
from .sums import FileSource, RunningSum
from .wire import Wire

_CURRENT = ("slot-0", "slot-1")


@dataclass(frozen=True)
class Offer:
    """A blob that is about to be sent: whose, which save, and how many bytes in all and of payload."""

    rank: int
    lineage: Lineage
    step: int
    size_bytes: int
    payload_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Offer:
        """Raises KeyError, TypeError or ValueError when `value` is no offer."""
        offer = Offer(
            int(value["rank"]),
            Lineage(int(value["lineage"]["generation"]), str(value["lineage"]["id"])),
            int(value["step"]),
            int(value["size_bytes"]),
            int(value["payload_bytes"]),
        )
        if not 0 <= offer.payload_bytes <= offer.size_bytes - HEAD_BYTES:
            raise ValueError(f"{offer.payload_bytes} bytes of payload in a blob of {offer.size_bytes}")
        return offer


@dataclass(frozen=True)
class OpenBlob:
    """An open file as a `sums.Source`."""

    name: str
    file: BinaryIO
    parallel_reads: int = 1

    def read(self, offset: int, size_bytes: int) -> bytes:
        return os.pread(self.file.fileno(), size_bytes, offset)


@dataclass(frozen=True)
class _Received:
    """A blob in a slot whose head is not in its place yet."""

    name: str
    head: bytes
    memory: memoryview
    parallel_reads: int = 1

    def read(self, offset: int, size_bytes: int) -> bytes:
        return self.head if offset == 0 else bytes(self.memory[offset : offset + size_bytes])


def open_blob(root: Path, path: str) -> BinaryIO:
    """Open a blob's file for reading: one that BLOB_PATH matches, below `root`, by way of no symbolic link.

    Raises StorageError otherwise, and when there is none.
    """
    if not BLOB_PATH.fullmatch(path):
        raise StorageError(f"{path!r} names no blob", shared_by_all_ranks=False)
    *folders, name = path.split("/")
    with readable_errors(root / path, "opening"):
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for inner in folders:
                below = os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{root / path} is no file", shared_by_all_ranks=False)
    return open(descriptor, "rb", buffering=0)


def held_blobs(root: Path) -> list[tuple[str, int]]:
    """Path from `root` and size in bytes of every file that may hold a blob and is behind no symbolic link."""
    found = []
    root = root.resolve()
    for path in sorted(root.glob("*/rank-*/*")):
        relative = path.relative_to(root).as_posix()
        if BLOB_PATH.fullmatch(relative) and path.is_file() and path.resolve() == root / relative:
            found.append((relative, path.stat().st_size))
    return found


def reserve(root: Path, copies: Mapping[int, int]) -> None:
    """Claim two slots of `copies[rank]` bytes for each rank. Slots of that size stay as they are.

    Others are set aside, and freed when both new slots hold a blob: theirs may be all that is left of a checkpoint.
    Raises StorageError with figures, and claims nothing, when memory does not suffice.
    """
    missing = {
        rank_folder(root, COPIES, rank) / name: size_bytes
        for rank, size_bytes in sorted(copies.items())
        for name in _CURRENT
        if _size(rank_folder(root, COPIES, rank) / name) != size_bytes
    }
    needed = sum(missing.values())
    free = shutil.disk_usage(root).free + sum(_size(path) or 0 for path in missing if _table(path) is None)
    if needed > free:
        old = [path for rank in copies for path in rank_folder(root, COPIES, rank).glob("slot-*")]
        aside = sum(path.stat().st_size for path in old if path in missing or path.name not in _CURRENT if _table(path))
        kept = f" ({format_bytes(aside)} hold copies of an earlier start)" if aside else ""
        raise StorageError(
            f"copies of other nodes' checkpoints need {format_bytes(needed)} more shared memory in {root}, found "
            f"{format_bytes(free)} free{kept}; enlarge it (containers: --shm-size), choose another --memory_tier_dir, "
            f"or set --in_memory_checkpointing_freq=0",
            shared_by_all_ranks=False,
        )
    for path in missing:
        if path.exists():
            _set_aside(path)
    claimed: list[Path] = []
    try:
        for path, size_bytes in missing.items():
            claim(path, size_bytes)
            claimed.append(path)
    except BaseException:  # also a signal: memory that is half claimed would stay taken
        for path in claimed:
            path.unlink()
        raise


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _aside(folder: Path) -> list[Path]:
    return [path for path in folder.glob("slot-*") if path.name not in _CURRENT]


def _set_aside(path: Path) -> None:
    """Make room for a slot of another size; one without a blob is of no use to anybody."""
    if _table(path) is None:
        path.unlink()
        return
    numbers = [int(other.name.removeprefix("slot-")) for other in path.parent.glob("slot-*")]
    path.rename(path.with_name(f"slot-{max(*numbers, 1) + 1}"))


def _table(path: Path) -> BlobTable | None:
    try:
        return read_table(FileSource(path))
    except (DamagedCheckpoint, FileNotFoundError):
        return None


def _age(table: BlobTable | None) -> tuple[Any, ...]:
    """Smallest for what may be overwritten first: nothing, then the older timeline, then the older step."""
    return () if table is None else (table.lineage, table.step)


def choose_slot(root: Path, offer: Offer) -> Path | None:
    """The slot that `offer` goes to, never the one with the newest blob; None when that is the offered one itself.

    Raises StorageError when no memory was reserved for it.
    """
    folder = rank_folder(root, COPIES, offer.rank)
    tables = {folder / name: _table(folder / name) for name in _CURRENT if (folder / name).is_file()}
    if len(tables) < len(_CURRENT):
        raise StorageError(f"no memory is reserved for copies of rank {offer.rank}", shared_by_all_ranks=False)
    oldest, newest = sorted(tables, key=lambda path: _age(tables[path]))
    if (size := oldest.stat().st_size) < offer.size_bytes:
        raise StorageError(
            f"{format_bytes(size)} are reserved for a copy of rank {offer.rank}, found a blob of "
            f"{format_bytes(offer.size_bytes)}",
            shared_by_all_ranks=False,
        )
    held = tables[newest]
    same = held is not None and (held.lineage, held.step) == (offer.lineage, offer.step)
    return None if same else oldest


def receive(wire: Wire, path: Path, offer: Offer) -> None:
    """Take the offered blob from `wire` into the slot at `path`; it counts when all of it is there and as it was sent.

    Raises DamagedCheckpoint when it is not (all of it was taken off the wire) and WireError when it was cut off.
    """
    with open(path, "r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), offer.size_bytes))
    view[:HEAD_BYTES] = NO_HEAD
    head = bytearray(HEAD_BYTES)
    running = RunningSum()
    wire.receive_into(memoryview(head))
    wire.receive_into(view[HEAD_BYTES : HEAD_BYTES + offer.payload_bytes], running.add)
    wire.receive_into(view[HEAD_BYTES + offer.payload_bytes :])
    _check(_Received(f"the copy of rank {offer.rank}", bytes(head), view), offer, running)
    view[:HEAD_BYTES] = head
    _free_aside(path.parent)


def _check(received: _Received, offer: Offer, running: RunningSum) -> None:
    if blob_bytes(received.head) != offer.size_bytes:
        raise DamagedCheckpoint(f"{received.name} arrived with a damaged head")
    table = read_table(received)
    if table is None or (table.rank, table.lineage, table.step) != (offer.rank, offer.lineage, offer.step):
        raise DamagedCheckpoint(f"{received.name} is not the blob that was offered, step {offer.step}")
    if table.payload != running.result():
        raise DamagedCheckpoint(f"{received.name} arrived with bytes that do not match their checksums")


def _free_aside(folder: Path) -> None:
    """Both slots hold a blob of this start's size: those of an earlier one are superseded."""
    if all(_table(folder / name) is not None for name in _CURRENT):
        for path in _aside(folder):
            path.unlink(missing_ok=True)
