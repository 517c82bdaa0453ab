"""A location as a file to read."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .hub import HubFile, downloaded_file
from .patience import Patience
from .s3 import fetch_range, size_of

# A request costs some tens of milliseconds; this much costs more to transfer.
_BUFFER_BYTES = 4 * 2**20
# What has come is kept when a request fails, so a read of hundreds of MB is made of several.
_LARGEST_REQUEST_BYTES = 16 * 2**20


def open_file(location: str, *, size_bytes: int | None = None, patience: Patience | None = None) -> BinaryIO:
    """Open a local path, s3://bucket/key or hf://datasets/org/name@commit/path for reading; seekable.

    `size_bytes`: what a listing said; a shorter file (a local one: of any other size) is an error, never a short
    read. A remote read that fails or stalls is made again, from the byte it reached, for as long as `patience` says;
    then StorageError names location, byte and cause. DataError: no such object, no right, another size. OSError: a
    local file's.
    """
    if "://" not in location:
        return _open_local(location, size_bytes)
    if location.startswith("hf://") and (downloaded := downloaded_file(location)) is not None:
        return _open_local(str(downloaded), size_bytes)
    remote = open_ranges(location, size_bytes=size_bytes, patience=patience)
    return io.BufferedReader(_RangeFile(remote.size_bytes, remote.fetch), _BUFFER_BYTES)


@dataclass(frozen=True)
class Ranges:
    """A file as ranges of its bytes: `fetch(start, end)` gives exactly these, from any thread."""

    size_bytes: int
    fetch: Callable[[int, int], bytes | bytearray]


def open_ranges(location: str, *, size_bytes: int | None = None, patience: Patience | None = None) -> Ranges:
    """The same locations as `open_file`, with its errors, for those who know which bytes they want."""
    if location.startswith("hf://") and (downloaded := downloaded_file(location)) is not None:
        location = str(downloaded)
    if "://" not in location:
        found = _local_size(location, size_bytes)
        return Ranges(found, functools.partial(_fetch_local, location))
    patience = patience or Patience()
    scheme = location.split("://", 1)[0]
    if scheme == "s3":
        size_bytes = size_of(location, patience) if size_bytes is None else size_bytes
        return Ranges(size_bytes, functools.partial(fetch_range, location, patience=patience))
    if scheme != "hf":
        raise DataError(f"found {location}; expected a path, s3://… or hf://…")
    file = HubFile(location, patience)
    return Ranges(file.size_bytes() if size_bytes is None else size_bytes, file.fetch)


def _open_local(location: str, size_bytes: int | None) -> BinaryIO:
    _local_size(location, size_bytes)
    return open(location, "rb")


def _local_size(location: str, expected: int | None) -> int:
    found = Path(location).stat().st_size
    if expected is not None and found != expected:
        raise DataError(f"{location}: found {found} bytes; expected the {expected} it had when it was listed")
    return found


def _fetch_local(location: str, start: int, end: int) -> bytearray:
    content, filled = bytearray(end - start), 0
    with open(location, "rb", buffering=0) as file, memoryview(content) as view:
        file.seek(start)
        while filled < len(content) and (count := file.readinto(view[filled:])):
            filled += count
    if filled < len(content):
        raise DataError(f"{location}: it ends at byte {start + filled}; expected bytes up to {end}")
    return content


class _RangeFile(io.RawIOBase):
    """A file of which ranges of bytes are fetched; each fetch is whole or raises."""

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes | bytearray]) -> None:
        self._size_bytes, self._fetch, self._position = size_bytes, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"seeking to byte {start + offset}")
        self._position = start + offset
        return self._position

    def readall(self) -> bytes:
        """The base class would make a request for every 8 KiB."""
        return b"".join(iter(lambda: self.read(_LARGEST_REQUEST_BYTES) or b"", b""))

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self._size_bytes - self._position, _LARGEST_REQUEST_BYTES)
        if num_bytes <= 0:
            return 0
        buffer[:num_bytes] = self._fetch(self._position, self._position + num_bytes)
        self._position += num_bytes
        return num_bytes
