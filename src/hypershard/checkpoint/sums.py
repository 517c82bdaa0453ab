"""Checksums of what was saved, block by block, and reading nothing that does not match them. Needs no torch.

CRC32C because S3 checks the same sum of every part that arrives, and because processors compute it: some 20 GB/s
on one core. A sum per block, not per file, lets a rank read and check just the ranges it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from ..errors import DamagedCheckpoint, StorageError

BLOCK_BYTES = 32 * 2**20


def crc32c(data: Any, start: int = 0) -> int:
    """CRC32C (Castagnoli) of a bytes-like object, going on from `start`, the sum of what came before it."""
    from awscrt import checksums  # a compiled library; `hypershard --help` does not need it

    view = memoryview(data)
    return int(checksums.crc32c(view, start)) if view.nbytes else start


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and the CRC32C of every BLOCK_BYTES of one file (or of one blob's payload)."""

    size_bytes: int
    blocks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"size_bytes": self.size_bytes, "crc32c": [f"{block:08x}" for block in self.blocks]}

    @staticmethod
    def from_json(value: Any) -> FileSum:
        """Raises ValueError, KeyError or TypeError when `value` is no such thing."""
        found = FileSum(int(value["size_bytes"]), tuple(int(block, 16) for block in value["crc32c"]))
        if found.size_bytes < 0 or len(found.blocks) != num_blocks(found.size_bytes):
            raise ValueError(f"{len(found.blocks)} checksums for {found.size_bytes} bytes")
        return found


def num_blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


class RunningSum:
    """The sum of bytes that arrive piece by piece."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._blocks: list[int] = []

    def add(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            in_block = self.size_bytes % BLOCK_BYTES
            if not in_block:
                self._blocks.append(0)
            piece = view[: BLOCK_BYTES - in_block]
            self._blocks[-1] = crc32c(piece, self._blocks[-1])
            self.size_bytes += piece.nbytes
            view = view[piece.nbytes :]

    def result(self) -> FileSum:
        return FileSum(self.size_bytes, tuple(self._blocks))


def sum_of(data: Any) -> FileSum:
    running = RunningSum()
    running.add(data)
    return running.result()


class Source(Protocol):
    """Bytes that can be read from anywhere in them: a file, an object in a bucket, another node's memory."""

    @property
    def name(self) -> str:
        """What a person would look for: a path or URI."""

    @property
    def parallel_reads(self) -> int:
        """How many reads at once pay off."""

    def read(self, offset: int, size_bytes: int) -> Any:
        """These bytes, fewer where it ends. Raises FileNotFoundError, another OSError or StorageError."""


@dataclass(frozen=True)
class FileSource:
    """A file on a disk of this node."""

    path: Path
    parallel_reads: int = 2

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, offset: int, size_bytes: int) -> memoryview:
        content, filled = memoryview(bytearray(size_bytes)), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            while filled < size_bytes and (count := file.readinto(content[filled:])):
                filled += count
        return content[:filled]


def read_verified(
    source: Source, expected: FileSum, requests: Sequence[tuple[int, int]], *, start: int = 0
) -> Iterator[memoryview]:
    """Yield the bytes of each request (offset, size_bytes), in ascending order of their offsets.

    The summed bytes begin at `start` in the source; offsets count from there. Whole blocks are read, each once, some
    ahead of need, and no byte of one is handed out before its sum matched. Raises DamagedCheckpoint if it does not.
    """
    assert all(left[0] <= right[0] for left, right in pairwise(requests))
    needed = sorted({block for offset, size in requests for block in _blocks_of(offset, size)})
    with ThreadPoolExecutor(source.parallel_reads) as pool:
        ahead: deque[int] = deque(needed)
        held: dict[int, Future[memoryview]] = {}

        def fetch_ahead() -> None:
            while ahead and len(held) < source.parallel_reads + 1:
                block = ahead.popleft()
                held[block] = pool.submit(_read_block, source, expected, block, start)

        try:
            for offset, size in requests:
                blocks = _blocks_of(offset, size)
                content = None if len(blocks) == 1 else memoryview(bytearray(size))
                for block in blocks:
                    for passed in [other for other in held if other < block]:
                        del held[passed]
                    fetch_ahead()
                    view = held[block].result()
                    begin = max(offset, block * BLOCK_BYTES)
                    end = min(offset + size, block * BLOCK_BYTES + view.nbytes)
                    inside = begin - block * BLOCK_BYTES
                    part = view[inside : inside + end - begin]
                    if content is None:
                        content = part  # of one block: handed out as it lies there
                    else:
                        content[begin - offset : end - offset] = part
                assert content is not None
                yield content
        finally:
            pool.shutdown(cancel_futures=True)


def _blocks_of(offset: int, size_bytes: int) -> range:
    return range(offset // BLOCK_BYTES, num_blocks(offset + size_bytes)) if size_bytes else range(0)


def _read_block(source: Source, expected: FileSum, block: int, start: int) -> memoryview:
    offset = block * BLOCK_BYTES
    size_bytes = min(BLOCK_BYTES, expected.size_bytes - offset)
    if size_bytes <= 0:
        raise DamagedCheckpoint(f"{source.name}: byte {offset} was asked for, expected only {expected.size_bytes}")
    view = memoryview(source.read(start + offset, size_bytes)).cast("B")
    if view.nbytes != size_bytes:
        raise DamagedCheckpoint(
            f"{source.name}: found {start + offset + view.nbytes} bytes, expected {start + expected.size_bytes}"
        )
    if (found := crc32c(view)) != expected.blocks[block]:
        raise DamagedCheckpoint(
            f"{source.name}: found checksum {found:08x} of bytes {start + offset} to "
            f"{start + offset + size_bytes - 1}, expected {expected.blocks[block]:08x}"
        )
    return view


def damage_of(source: Source, expected: FileSum, *, start: int = 0) -> str | None:
    """What is wrong with the bytes of `source`, or None when all are as saved."""
    blocks = [(block * BLOCK_BYTES, 1) for block in range(num_blocks(expected.size_bytes))]
    try:
        for _ in read_verified(source, expected, blocks, start=start):
            pass
    except (DamagedCheckpoint, StorageError) as error:
        return str(error)
    except OSError as error:
        return f"{source.name} cannot be read: {error.strerror or error}"
    return None
