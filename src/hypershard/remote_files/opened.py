"""A location as a file to read."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
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
    patience = patience or Patience()
    scheme = location.split("://", 1)[0]
    if scheme == "s3":
        size_bytes = size_of(location, patience) if size_bytes is None else size_bytes
        fetch: Callable[[int, int], bytes] = functools.partial(fetch_range, location, patience=patience)
    elif scheme == "hf":
        if (downloaded := downloaded_file(location)) is not None:
            return _open_local(str(downloaded), size_bytes)
        file = HubFile(location, patience)
        size_bytes = file.size_bytes() if size_bytes is None else size_bytes
        fetch = file.fetch
    else:
        raise DataError(f"--dataset: found {location}; expected a path, s3://… or hf://…")
    return io.BufferedReader(_RangeFile(size_bytes, fetch), _BUFFER_BYTES)


def _open_local(location: str, size_bytes: int | None) -> BinaryIO:
    found = Path(location).stat().st_size
    if size_bytes is not None and found != size_bytes:
        raise DataError(f"{location}: found {found} bytes; expected the {size_bytes} it had when it was listed")
    return open(location, "rb")


class _RangeFile(io.RawIOBase):
    """A file of which ranges of bytes are fetched; each fetch is whole or raises."""

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes]) -> None:
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
