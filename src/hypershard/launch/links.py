"""Connections between the supervisors of a job's nodes, so that each learns at once how the others fare.

    node 0 ── node 1          a star around node 0, which passes on what it hears
       ├───── node 2          {"node": 1, "host": "algo-2", "kind": "stop", "text": "SIGTERM"}
       └───── node 3          one JSON object a line; a connection that closes without "ended" is a lost node

Ranks alone do not tell: NCCL over EFA waits for a dead peer until its own time-out of many minutes. A node that dies
closes its connections, which shows at once; one that falls silent (power, network) fails the kernel's keep-alive
probes after SILENT_SECONDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
from dataclasses import dataclass
from typing import Literal

from ..errors import HypershardError
from ..units import format_seconds
from .hosts import Wait, address_of, interface_of
from .surroundings import NodePlace

SILENT_SECONDS = 40  # long enough for a switch that restarts, short beside a GPU hour
_SLICE_SECONDS = 1.0
_LONGEST_NOTE_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a node has to tell: it was asked to stop (`text`: the signal), it ended (`code`, `text`: the error), or it
    is lost (`text`: how that was noticed)."""

    node: int
    host: str
    kind: Literal["hello", "go", "stop", "ended", "lost"]
    text: str = ""
    code: int = 0


class _Line:
    """One connection: whole notes out of the bytes that come."""

    def __init__(self, connection: socket.socket, *, silent_seconds: int):
        self.socket = connection
        self.peer: Note | None = None
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe_seconds = max(1, silent_seconds // 8)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, silent_seconds // probe_seconds - 1))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silent_seconds * 1000)  # for what is sent
        connection.settimeout(silent_seconds)

    def send(self, note: Note) -> None:
        with contextlib.suppress(OSError):  # a peer that is gone is noticed by reading
            self.socket.sendall(json.dumps(dataclasses.asdict(note)).encode() + b"\n")

    def read(self, *, most_bytes: int = 65536) -> list[Note]:
        """The notes that came. Raises OSError when the connection is gone, ValueError for what is none of ours."""
        chunk = self.socket.recv(most_bytes)
        if not chunk:
            raise ConnectionError("connection closed")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_NOTE_BYTES:
            raise ValueError("found no end of a note")
        try:
            return [Note(**json.loads(line)) for line in lines]
        except TypeError as error:
            raise ValueError(str(error)) from None


class Links:
    """This node's connections. Use `open_links` to make them; a job of one node has none."""

    def __init__(self, place: NodePlace, lines: list[_Line]):
        self._place = place
        self._lines = lines
        self._ended: set[int] = set()  # nodes that said so, whose connections may close

    def sockets(self) -> list[socket.socket]:
        return [line.socket for line in self._lines]

    def interface(self) -> str | None:
        """The network interface by which this node and the others reach each other; None: one node, or not known."""
        if not self._lines:
            return None
        return interface_of(self._lines[0].socket.getsockname()[0].removeprefix("::ffff:"))  # IPv4 inside IPv6

    def read(self, ready: socket.socket) -> list[Note]:
        """What a socket that is ready to be read tells; node 0 passes it on."""
        line = next((line for line in self._lines if line.socket is ready), None)
        if line is None:
            return []
        try:
            notes = line.read()
        except (OSError, ValueError) as error:
            self._lines.remove(line)
            line.socket.close()
            assert line.peer is not None
            if line.peer.node in self._ended:
                return []
            reason = getattr(error, "strerror", None) or str(error)
            notes = [dataclasses.replace(line.peer, kind="lost", text=reason.lower(), code=0)]
        for note in notes:
            if note.kind == "ended":
                self._ended.add(note.node)
            if self._place.node_rank == 0:
                self._send(note, but=note.node)
        return notes

    def tell(self, kind: Literal["stop", "ended"], text: str, *, code: int = 0) -> None:
        """Tell every other node of this one."""
        self._send(Note(node=self._place.node_rank, host=self._place.host, kind=kind, text=text, code=code), but=-1)

    def _send(self, note: Note, *, but: int) -> None:
        for line in self._lines:
            if line.peer is not None and line.peer.node != but:
                line.send(note)

    def close(self) -> None:
        for line in self._lines:
            line.socket.close()
        self._lines.clear()


def open_links(place: NodePlace, *, wait: Wait, silent_seconds: int = SILENT_SECONDS) -> Links:
    """Connect this node with the others; returns on all nodes when all are there.

    Raises HypershardError naming the nodes that did not come before `wait` was over, Stopped when a signal came first.
    """
    if place.num_nodes == 1:
        return Links(place, [])
    if place.node_rank == 0:
        return Links(place, _gather(place, wait, silent_seconds))
    return Links(place, [_join(place, wait, silent_seconds)])


def _gather(place: NodePlace, wait: Wait, silent_seconds: int) -> list[_Line]:
    """On node 0: one connection from each other node. A node that starts anew meanwhile replaces itself."""
    lines: list[_Line] = []
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(
        ("", place.port + 1), family=family, backlog=place.num_nodes, dualstack_ipv6=both
    ) as server:
        while len(present := {line.peer.node for line in lines if line.peer}) < place.num_nodes - 1:
            ready, _, _ = select.select([server, *(line.socket for line in lines)], [], [], _SLICE_SECONDS)
            if server in ready:
                lines.append(_Line(server.accept()[0], silent_seconds=silent_seconds))
            lines = [line for line in lines if line.socket not in ready or _greets(line, place)]
            lines = list({line.peer.node if line.peer else id(line): line for line in lines}.values())
            if wait.is_over():
                missing = sorted(set(range(1, place.num_nodes)) - present)
                raise HypershardError(
                    f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {place.num_nodes} did "
                    f"not come within {format_seconds(wait.seconds)} to {place.main_host}, port {place.port + 1}"
                )
    lines = [line for line in lines if line.peer is not None]
    for line in lines:
        line.send(Note(node=0, host=place.host, kind="go", text=place.job))
    return lines


def _greets(line: _Line, place: NodePlace) -> bool:
    """Whether a connection is one of this job's nodes; closes it otherwise (an end of a former start, a stranger)."""
    try:
        for note in line.read():
            if note.kind != "hello" or note.text != place.job or not 0 < note.node < place.num_nodes:
                raise ValueError
            line.peer = note
    except (OSError, ValueError):
        line.socket.close()
        return False
    return True


def _join(place: NodePlace, wait: Wait, silent_seconds: int) -> _Line:
    """On another node: the connection to node 0, kept up until it says that all have come."""
    while True:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or lost while others were waited for
            return _one_try(place, wait, silent_seconds)
        if wait.is_over():
            raise HypershardError(
                f"node 0 ({place.main_host}, port {place.port + 1}) did not answer within "
                f"{format_seconds(wait.seconds)}; is it there, and is the port open between the nodes?"
            )
        wait.pause()


def _one_try(place: NodePlace, wait: Wait, silent_seconds: int) -> _Line:
    address = address_of(place.main_host, wait=wait)  # again each time: a replaced node has another address
    line = _Line(socket.create_connection((address, place.port + 1), timeout=5.0), silent_seconds=silent_seconds)
    try:
        line.send(Note(node=place.node_rank, host=place.host, kind="hello", text=place.job))
        while not wait.is_over():
            if select.select([line.socket], [], [], _SLICE_SECONDS)[0]:
                # No byte beyond the first note: what follows is for the supervisor, which waits for the socket.
                for note in line.read(most_bytes=1):
                    line.peer = dataclasses.replace(note, node=0)
                    return line
    except BaseException:  # an interrupt too: nobody else knows of the connection yet
        line.socket.close()
        raise
    raise TimeoutError
