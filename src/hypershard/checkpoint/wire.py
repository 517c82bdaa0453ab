"""How agents and their clients talk: who is who, what was asked, and bytes. No torch, no pickle.

Both sides know the agent's token and neither sends it. A connection begins with a greeting of fixed size:

    agent  -> client   magic, 32 random bytes a
    client -> agent    magic, 32 random bytes c, HMAC(token, "client" a c)
    agent  -> client   HMAC(token, "agent" a c)

From then on each side sends headers: length, JSON, HMAC over a counter and the JSON, with a key made of token, a and
c for this connection and direction alone. A header that names a size is followed by so many raw bytes.

What this protects: only one who knows the token is heard (authentication); a header can be neither forged nor
changed, repeated or left out (integrity). Raw bytes are blobs or parts of them and carry their own CRC32C, which finds
every accident but is no proof against someone who sits on the path and rewrites packets. Nothing is secret on the way.

Nothing waits for ever: every single send and receive has an idle time-out, so a slow transfer that goes on is left
alone and one that stalls is an error.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

IDLE_SECONDS = 30.0  # far above any pause of a healthy network, far below a person's patience
GREETING_SECONDS = 10.0  # for the whole greeting
_WORKING_SECONDS = 2.0  # how often an agent says that it is still at work, or thrice in a shorter time-out
MAX_HEADER_BYTES = 2**20  # the list of all blobs of a node of 1000 ranks fits
PIECE_BYTES = 2**20  # handed from hand to hand while still in the processor's cache
_MAGIC = b"HSAGENT1"
_NONCE_BYTES = _MAC_BYTES = 32
_LENGTH = struct.Struct("!I")
_COUNTER = struct.Struct("!Q")


class WireError(Exception):
    """The other side is gone, silent, or not what it should be; the text goes after its name."""


class WireClosed(WireError):
    """The other side ended the connection."""


class Wire:
    """One connection after its greeting. Not for two threads at once, but for one that sends and one that receives."""

    def __init__(self, connection: socket.socket, *, send_key: bytes, receive_key: bytes, timeout_seconds: float):
        self._connection = connection
        self._send_key, self._receive_key = send_key, receive_key
        self._num_sent = self._num_received = 0
        self._timeout_seconds = timeout_seconds
        connection.settimeout(timeout_seconds)

    def close(self) -> None:
        self._connection.close()

    def send(self, header: Mapping[str, Any]) -> None:
        """Raises WireError, as all methods do."""
        content = json.dumps(header, separators=(",", ":")).encode()
        if len(content) > MAX_HEADER_BYTES:
            raise WireError(f"was to be sent a header of {len(content)} bytes, at most {MAX_HEADER_BYTES} are allowed")
        mac = _mac(self._send_key, _COUNTER.pack(self._num_sent) + content)
        self._num_sent += 1
        self.send_bytes(_LENGTH.pack(len(content)) + content + mac)

    def send_bytes(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        with _plain_errors(self._timeout_seconds):
            while view.nbytes:  # not sendall, whose time-out is for all of it
                view = view[self._connection.send(view) :]

    def send_file(self, file: BinaryIO, *, offset: int, size_bytes: int) -> None:
        """Send this part of a file from the page cache, without a copy (`os.sendfile`)."""
        with _plain_errors(self._timeout_seconds):
            num_sent = self._connection.sendfile(file, offset, size_bytes) if size_bytes else 0
        if num_sent != size_bytes:
            raise WireError(f"could be sent only {num_sent} of {size_bytes} bytes: the file was cut off meanwhile")

    def has_more(self, *, within_seconds: float) -> bool:
        """Whether the other side sends anything, or ends the connection, in that time."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(within_seconds * 1000))

    def receive(self) -> dict[str, Any]:
        length = bytearray(_LENGTH.size)
        self.receive_into(memoryview(length))
        (size,) = _LENGTH.unpack(length)
        if size > MAX_HEADER_BYTES:
            raise WireError(f"sent a header of {size} bytes, at most {MAX_HEADER_BYTES} are allowed")
        content = bytearray(size + _MAC_BYTES)
        self.receive_into(memoryview(content))
        expected = _mac(self._receive_key, _COUNTER.pack(self._num_received) + content[:size])
        if not hmac.compare_digest(expected, bytes(content[size:])):
            raise WireError("sent a header that was changed on the way")
        self._num_received += 1
        with contextlib.suppress(ValueError):
            header = json.loads(content[:size])
            if isinstance(header, dict):
                return header
        raise WireError("sent a header that is no JSON object")

    def receive_into(self, view: memoryview, use: Callable[[memoryview], None] | None = None) -> None:
        """Fill `view`; `use` is given each piece as it has come."""
        with _plain_errors(self._timeout_seconds):
            while view.nbytes:
                size = self._connection.recv_into(view[:PIECE_BYTES])
                if not size:
                    raise WireClosed("ended the connection")
                if use is not None:
                    use(view[:size])
                view = view[size:]

    @contextlib.contextmanager
    def still_working(self) -> Iterator[None]:
        """Tell the other side now and then that the answer is being made. Nothing else may be sent meanwhile."""
        done = threading.Event()
        pause_seconds = min(_WORKING_SECONDS, self._timeout_seconds / 3)

        def tell() -> None:
            with contextlib.suppress(WireError):  # whoever sends the answer will notice
                while not done.wait(pause_seconds):
                    self.send({"working": True})

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            done.set()
            teller.join()

    def receive_answer(self) -> dict[str, Any]:
        """The next header that is not just a sign of life."""
        while (answer := self.receive()) == {"working": True}:
            pass
        return answer


def connect(host: str, port: int, token: str, *, timeout_seconds: float) -> Wire:
    """Connect to an agent and greet it. Raises WireError, also when it does not know the token."""
    with _plain_errors(timeout_seconds):
        connection = socket.create_connection((host, port), timeout=timeout_seconds)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + min(timeout_seconds, GREETING_SECONDS)
        first = _receive_by(connection, len(_MAGIC) + _NONCE_BYTES, deadline)
        if not first.startswith(_MAGIC):
            raise WireError("is no checkpoint agent of this version")
        nonces = first[len(_MAGIC) :] + (own := secrets.token_bytes(_NONCE_BYTES))
        with _plain_errors(timeout_seconds):
            connection.sendall(_MAGIC + own + _mac(token.encode(), b"client" + nonces))
        proof = _receive_by(connection, _MAC_BYTES, deadline)
        if not hmac.compare_digest(proof, _mac(token.encode(), b"agent" + nonces)):
            raise WireError("does not know its own token: something else answers at this address")
        return _wire(connection, token, nonces, ("to agent", "to client"), timeout_seconds)
    except BaseException:  # also a signal: nobody else knows of the connection yet
        connection.close()
        raise


def admit(connection: socket.socket, token: str, *, timeout_seconds: float) -> Wire:
    """Greet whoever connected. Raises WireError unless they know the token; the caller closes the connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    deadline = time.monotonic() + min(timeout_seconds, GREETING_SECONDS)
    own = secrets.token_bytes(_NONCE_BYTES)
    with _plain_errors(timeout_seconds):
        connection.settimeout(timeout_seconds)
        connection.sendall(_MAGIC + own)
    answer = _receive_by(connection, len(_MAGIC) + _NONCE_BYTES + _MAC_BYTES, deadline)
    nonces = own + answer[len(_MAGIC) : -_MAC_BYTES]
    expected = _mac(token.encode(), b"client" + nonces)
    if not answer.startswith(_MAGIC) or not hmac.compare_digest(answer[-_MAC_BYTES:], expected):
        raise WireError("does not know the token")
    with _plain_errors(timeout_seconds):
        connection.sendall(_mac(token.encode(), b"agent" + nonces))
    return _wire(connection, token, nonces, ("to client", "to agent"), timeout_seconds)


def _wire(
    connection: socket.socket, token: str, nonces: bytes, directions: tuple[str, str], timeout_seconds: float
) -> Wire:
    send_key, receive_key = (_mac(token.encode(), direction.encode() + nonces) for direction in directions)
    return Wire(connection, send_key=send_key, receive_key=receive_key, timeout_seconds=timeout_seconds)


def _mac(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")


def _receive_by(connection: socket.socket, size_bytes: int, deadline: float) -> bytes:
    """Just so many bytes, all of them before `deadline` (`time.monotonic`), however they drip in."""
    content = b""
    while len(content) < size_bytes:
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0:
            raise WireError("did not finish its greeting in time")
        connection.settimeout(left_seconds)
        with _plain_errors(left_seconds):
            piece = connection.recv(size_bytes - len(content))
        if not piece:
            raise WireClosed("ended the connection during the greeting (another token?)")
        content += piece
    return content


@contextlib.contextmanager
def _plain_errors(timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise WireError(f"did not move a byte for {timeout_seconds:.3g} seconds") from error
    except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError) as error:
        raise WireClosed("broke the connection") from error
    except OSError as error:
        raise WireError(f"cannot be reached: {error.strerror or error}") from error
