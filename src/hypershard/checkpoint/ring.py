"""Which nodes keep copies of which, and by what address a node is found. Pure but for questions to the kernel."""

from __future__ import annotations

import fcntl
import functools
import socket
import struct
from collections.abc import Sequence

from ..errors import StorageError

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def copy_nodes(domains: Sequence[str], node: int, copies: int) -> list[int]:
    """The nodes that keep copies of `node`'s blobs: `copies` of them, or all others where there are fewer.

    `domains[i]` names what fails together with node i, "" is unknown. The nodes stand in a ring, domain by domain,
    and all copies move by the same number of places, so each node keeps just as many as every other. Taken are
    those numbers of places by which the fewest copies stay in their domain, the smallest first: without domains,
    the next nodes.
    """
    ring, moves = _moves(tuple(domains))
    at = ring.index(node)
    return [ring[(at + places) % len(ring)] for places in moves[:copies]]


@functools.lru_cache(maxsize=4)
def _moves(domains: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The ring, and the numbers of places to move by, best first."""
    num_nodes = len(domains)
    names = [domain or f"\0{number}" for number, domain in enumerate(domains)]  # an unknown one is its own
    first = {name: names.index(name) for name in names}
    ring = sorted(range(num_nodes), key=lambda one: (first[names[one]], one))

    def num_staying(places: int) -> int:
        return sum(names[ring[at]] == names[ring[(at + places) % num_nodes]] for at in range(num_nodes))

    return ring, sorted(range(1, num_nodes), key=lambda places: (num_staying(places), places))


def own_address(towards: str) -> str:
    """The address of this node on the way to `towards` (a host name or address). Sends nothing.

    Raises StorageError when the name is unknown or there is no way.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: only chooses the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StorageError(
            f"no way to {towards} for copies of checkpoints: {error.strerror or error}", shared_by_all_ranks=False
        ) from error


def interface_address(name: str) -> str:
    """The IPv4 address of an interface; of a list ("eth1,eth0") the first that exists and has one.

    Raises StorageError naming the interfaces there are.
    """
    for one in name.split(","):
        request = struct.pack("256s", one.strip().encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:
                continue
        return socket.inet_ntoa(answer[20:24])
    found = ", ".join(interface for _, interface in socket.if_nameindex())
    raise StorageError(
        f"no network interface {name!r} with an IPv4 address on this node, found {found}; change GLOO_SOCKET_IFNAME",
        shared_by_all_ranks=False,
    )
