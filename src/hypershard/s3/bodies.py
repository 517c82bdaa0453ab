"""The bytes of requests and answers, in pieces, with a look at the clock between them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from .refusals import Broken

_PIECE_BYTES = 2**20


class Body:
    """The bytes of a request, for botocore to read in pieces.

    Given the bytes themselves, it would copy them once more, and urllib3 would allow the connect time-out for all of
    them, not for each piece. `check` is called before each piece and may raise.
    """

    def __init__(self, content: memoryview, check: Callable[[], None]) -> None:
        self._content, self._check, self._position = content, check, 0

    def __len__(self) -> int:
        return self._content.nbytes

    def read(self, num_bytes: int = -1) -> bytes:
        self._check()
        start = self._position
        self._position = len(self) if num_bytes < 0 else min(start + num_bytes, len(self))
        return bytes(self._content[start : self._position])

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self)}[whence]
        return self._position


def received(answer: dict[str, Any], size_bytes: int, check: Callable[[], None]) -> bytes:
    """The body of an answer, all `size_bytes` of it. Raises Broken when it breaks off."""
    pieces = []
    with answer["Body"] as stream:
        # `read1` returns with what has come, so a server that trickles does not keep us from looking at the clock.
        while piece := stream.read1(_PIECE_BYTES):
            pieces.append(piece)
            check()
    content = b"".join(pieces)
    if len(content) != size_bytes:
        raise Broken(f"the answer broke off after {len(content)} of {size_bytes} bytes")
    return content


def crc32c(content: memoryview) -> str:
    """CRC32C the way S3's headers write it."""
    from awscrt import checksums

    value = int(checksums.crc32c(content)) if content.nbytes else 0
    return base64.b64encode(value.to_bytes(4, "big")).decode()
