"""Host names of a cluster that is still starting: its name service may not know them yet."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from collections.abc import Callable

from ..errors import HypershardError
from ..units import format_seconds

_RETRY_SECONDS = 1.0
_SIOCGIFADDR = 0x8915  # from linux/sockios.h: an interface's IPv4 address


class Stopped(Exception):
    """A signal asked to end while this node waited for others. Nothing has been started yet."""


class Wait:
    """A limit to how long is waited for other nodes: `seconds` from now. `is_stopped` says whether to give up earlier.

    Many waits one after another share one limit, so that the whole start has it.
    """

    def __init__(self, seconds: float, *, is_stopped: Callable[[], bool]):
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._is_stopped = is_stopped

    def is_over(self) -> bool:
        """Raises Stopped when a signal has come."""
        if self._is_stopped():
            raise Stopped
        return time.monotonic() >= self._until

    def pause(self) -> None:
        time.sleep(_RETRY_SECONDS)


def address_of(host: str, *, wait: Wait) -> str:
    """The IPv4 address of `host`, or its IPv6 address where it has no other; asked again until `wait` is over.

    Raises HypershardError naming the host when the limit has passed, Stopped when a signal came first.
    """
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            if wait.is_over():
                raise HypershardError(
                    f"host {host}: no address after {format_seconds(wait.seconds)} ({error.strerror or error}); is the "
                    f"node there, and does this cluster's name service know it?"
                ) from None
            wait.pause()
        else:
            return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None where none has it as its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
