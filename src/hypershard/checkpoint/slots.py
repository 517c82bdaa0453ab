"""Host memory that saves are copied to, claimed once and used again: the memory tier's slots, or plain staging memory.

A slot becomes a blob (see blob.py): its head is zeroed, the tensors are copied in, then the checksums, the table and
the head are written. It lies in a file under /dev/shm and so outlives the process; without a folder it is anonymous
memory, which serves asynchronous saves and nothing else.
"""

from __future__ import annotations

import dataclasses
import mmap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedCheckpoint, StorageError
from ..log import logger
from ..units import format_bytes
from .blob import ALIGNMENT_BYTES, HEAD_BYTES, NO_HEAD, BlobTable, Item, head_bytes, read_table, table_bytes
from .memory_files import claim
from .snapshot import Snapshot, view_of
from .sums import FileSource, FileSum, sum_of

_TABLE_ROOM_BYTES = 2**16  # the facts' numbers grow by some digits over a run


def slot_bytes(items: list[Item], *, num_table_bytes: int) -> int:
    """Memory of a slot for `items` with a table of about `num_table_bytes`, a whole number of pages."""
    size = HEAD_BYTES + payload_bytes(items) + 2 * num_table_bytes + _TABLE_ROOM_BYTES
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def payload_bytes(items: list[Item]) -> int:
    end = items[-1].begin + items[-1].size_bytes if items else 0
    return -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Slot:
    """Memory for one save of one rank. `table` says what it holds once that is whole; `pins` counts its readers."""

    def __init__(self, path: Path | None, size_bytes: int):
        self.path = path
        self.table: BlobTable | None = None
        self.pins = 0
        flags = mmap.MAP_POPULATE  # all pages now: the first touch of memory is many times slower than a copy
        if path is None:
            self.memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
        else:
            with open(path, "r+b") as file:
                self.memory = mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED | flags)
        self._copied: torch.cuda.Event | None = None
        self._snapshot: Snapshot | None = None  # keeps the originals alive until they are copied

    def copy(self, snapshot: Snapshot, items: list[Item], stream: torch.cuda.Stream | None) -> Snapshot:
        """Begin to copy the parts in; the head is invalid from here on. Returns the snapshot with its values here.

        On a CPU the copy is done on return. On a GPU it runs on `stream` beside the training's own, after all
        that is enqueued there now: call `wait` before the originals change.
        """
        self.table = None
        self.memory[:HEAD_BYTES] = NO_HEAD
        parts = {}
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for planned, item in zip(snapshot.plan.items, items, strict=True):
                part = snapshot.parts[planned.index]
                parts[planned.index] = view_of(self.memory, item).copy_(part, non_blocking=stream is not None)
        if stream is not None:
            self._copied = stream.record_event()
            self._snapshot = snapshot
        return dataclasses.replace(snapshot, parts=parts)

    def wait(self) -> None:
        """Return when the copy is done."""
        copied = self._copied
        if copied is not None:  # several threads may wait
            copied.synchronize()
            self._copied = self._snapshot = None

    def commit(self, num_payload_bytes: int, make_table: Callable[[FileSum], BlobTable]) -> BlobTable:
        """Sum up the payload and make this a blob; until the last line it is none."""
        self.wait()
        view = memoryview(self.memory)
        table = make_table(sum_of(view[HEAD_BYTES : HEAD_BYTES + num_payload_bytes]))
        content = table_bytes(table)
        end = HEAD_BYTES + num_payload_bytes + len(content)
        if end > len(self.memory):
            raise StorageError(f"the facts of step {table.step} grew to {format_bytes(len(content))}: restart the run")
        view[end - len(content) : end] = content
        self.memory[:HEAD_BYTES] = head_bytes(content, payload_bytes=num_payload_bytes)
        self.table = table
        return table

    def pin_for_gpu(self) -> None:
        """Lock the pages so that a GPU copies to them directly, several times faster."""
        view = torch.frombuffer(self.memory, dtype=torch.uint8)
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(view.data_ptr(), len(self.memory), 0))
        if error:
            size = format_bytes(len(self.memory))
            logger.warning(f"checkpoints: {size} could not be pinned (CUDA error {error}); copies take longer")
            return
        # Runs before the memory itself is freed, and not at exit, when CUDA may be gone already.
        weakref.finalize(self, cudart.cudaHostUnregister, view.data_ptr()).atexit = False


class SlotPool:
    """The slots of one rank. The newest `num_kept` finished ones are not overwritten, nor is a pinned one."""

    def __init__(self, folder: Path | None, *, num_slots: int, size_bytes: int, num_kept: int, on_gpu: bool):
        self._free = threading.Condition()
        self._num_kept = num_kept
        self.slots = [Slot(path, size_bytes) for path in _claim_all(folder, num_slots, size_bytes)]
        for slot in self.slots:
            if slot.path is not None:
                slot.table = _table_of(slot.path)
            if on_gpu:
                slot.pin_for_gpu()

    def take(self, *, is_abandoned: Callable[[BlobTable], bool]) -> Slot:
        """The slot whose content matters least, pinned once; waits while every such slot is being read."""
        with self._free:
            while (slot := self._least_needed(is_abandoned)) is None:
                self._free.wait()
            slot.pins += 1
            return slot

    def _least_needed(self, is_abandoned: Callable[[BlobTable], bool]) -> Slot | None:
        whole = [slot for slot in self.slots if slot.table is not None and not is_abandoned(slot.table)]
        whole.sort(key=lambda slot: (slot.table.lineage, slot.table.step) if slot.table else ())
        kept = whole[-self._num_kept :] if self._num_kept else []
        order = [slot for slot in self.slots if slot not in whole] + whole
        return next((slot for slot in order if not slot.pins and slot not in kept), None)

    def pin(self, slot: Slot) -> None:
        with self._free:
            slot.pins += 1

    def release(self, slot: Slot) -> None:
        with self._free:
            slot.pins -= 1
            self._free.notify_all()


def _table_of(path: Path) -> BlobTable | None:
    try:
        return read_table(FileSource(path))
    except DamagedCheckpoint:
        return None


def existing_slots(folder: Path, size_bytes: int) -> list[Path]:
    """Slots of an earlier start that fit, which cost no more memory."""
    return [path for path in sorted(folder.glob("slot-*")) if path.stat().st_size == size_bytes]


def _claim_all(folder: Path | None, num_slots: int, size_bytes: int) -> list[Path | None]:
    if folder is None:
        return [None] * num_slots
    found = existing_slots(folder, size_bytes)[:num_slots]
    numbers = {path.name for path in folder.glob("slot-*")}
    number = 0
    while len(found) < num_slots:
        if f"slot-{number}" not in numbers:
            claim(folder / f"slot-{number}", size_bytes)
            found.append(folder / f"slot-{number}")
        number += 1
    return list(found)
