"""Files packed as .gz, .xz, .zst or .bz2, unpacked while they are read; what was cut off is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO, cast

from ...errors import DataError

_BUFFER_BYTES = 2**20
_ZST_PIECE_BYTES = 2**16


class Damaged(Exception):
    """Packed bytes that cannot be unpacked, or end too early."""


def unpacked(raw: BinaryIO, packing: str) -> BinaryIO:
    """The content of a file opened as `raw`, whose `packing` is as in `Format`. Reading it may raise Damaged."""
    if not packing:
        return raw
    openers: dict[str, Any] = {
        ".gz": lambda: gzip.GzipFile(fileobj=raw, mode="rb"),
        ".xz": lambda: lzma.LZMAFile(raw),  # noqa: SIM115 (`raw` is its opener's to close; this holds nothing else)
        ".bz2": lambda: bz2.BZ2File(raw),
        ".zst": lambda: _ZstFile(raw),
    }
    # Without this buffer each line would cost calls of Python code in the libraries' own files.
    return io.BufferedReader(_Checked(openers[packing]()), _BUFFER_BYTES)


class _Checked(io.RawIOBase):
    """An unpacked stream all of whose complaints are `Damaged`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return cast(int, self._inner.readinto(buffer))
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            if error.errno is not None:  # of the disk; the bz2 library has only this class and no number
                raise
            raise Damaged(str(error)) from error


class _ZstFile(io.RawIOBase):
    """Zstandard frames one after another. The library's own reader takes a frame cut off for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError("--dataset: .zst files need the package zstandard; pip install zstandard") from error
        self._library, self._raw = zstandard, raw
        self._frame: Any = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(_ZST_PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._unpack()
        num_bytes = min(len(buffer), len(self._content))
        buffer[:num_bytes] = self._content[:num_bytes]
        self._content = self._content[num_bytes:]
        return num_bytes

    def _unpack(self) -> None:
        # The largest window there is: `zstd --long=31` makes files that the default refuses.
        self._frame = self._frame or self._library.ZstdDecompressor(max_window_size=2**31).decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(self._packed))
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
