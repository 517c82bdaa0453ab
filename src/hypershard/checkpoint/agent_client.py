"""Asking a node's agent (agent.py): starting it, having copies made, reading another node's blobs. Needs no torch."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import hypershard

from ..errors import StorageError
from ..storage import readable_errors
from .copies import Offer
from .wire import IDLE_SECONDS, Wire, WireClosed, WireError, connect

ADDRESS_FILE, LOG_FILE, LOCK_FILE = "agent.json", "agent.log", "agent.lock"
AGENT_MODULE = "hypershard.checkpoint.agent"
LOCK_SECONDS = 15.0  # for the agent before to finish its writes and go
_START_SECONDS = 60.0  # Python starts slowly from a busy shared disk
_PING_SECONDS = 5.0
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "TMPDIR")  # no keys of buckets

T = TypeVar("T")


@dataclass(frozen=True)
class AgentAddress:
    """Where an agent listens, and the token without which it listens to nobody."""

    host: str
    port: int
    token: str = field(repr=False)


class AgentClient:
    """Requests to one agent. For any number of threads: each request has a connection to itself, kept for the next.

    All methods raise StorageError with one sentence when the agent is out of reach, silent for `timeout_seconds`, or
    refuses. The time-out is for each send and receive, so it need not grow with the blobs.
    """

    def __init__(self, address: AgentAddress, *, timeout_seconds: float = IDLE_SECONDS):
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._idle: list[Wire] = []
        self._lock = threading.Lock()

    def ping(self) -> dict[str, Any]:
        """`version`, `pid`, `host` and `roots` of the agent."""
        return self._request({"request": "ping"})

    def watch(self, pid: int) -> None:
        """From now on the agent lives as long as this process of its node."""
        self._request({"request": "watch", "pid": pid})

    def reserve(self, slot_bytes_by_rank: Mapping[int, int]) -> None:
        """Claim memory for two copies of each of these ranks of other nodes; the error has figures."""
        copies = {str(rank): size for rank, size in slot_bytes_by_rank.items()}
        self._request({"request": "reserve", "copies": copies})

    def replicate(self, path: str, targets: Sequence[AgentAddress]) -> list[str | None]:
        """Send the blob at `path` (from the memory root) to each target; for each None, or why it has no copy.

        Returns when all have it or failed. The blob must not change before that.
        """
        answer = self._request({"request": "replicate", "path": path, "targets": [asdict(one) for one in targets]})
        return [None if text is None else str(text) for text in answer["outcomes"]]

    def held(self, root: str) -> list[tuple[str, int]]:
        """Path and size in bytes of all that is held in `root` ("memory" or "disk")."""
        return [(str(path), int(size)) for path, size in self._request({"request": "list", "root": root})["held"]]

    def read(self, root: str, path: str, offset: int, size_bytes: int) -> bytearray:
        """These bytes of a blob's file, fewer where it ends."""

        def receive(wire: Wire, answer: dict[str, Any]) -> bytearray:
            found = int(answer["size_bytes"])
            if found > size_bytes:
                raise WireError(f"was asked for {size_bytes} bytes and sends {found}")
            content = bytearray(found)
            wire.receive_into(memoryview(content))
            return content

        header = {"request": "read", "root": root, "path": path, "offset": offset, "size_bytes": size_bytes}
        return self._exchange(header, receive)

    def put(self, file: BinaryIO, offer: Offer) -> None:
        """Send the agent a whole blob, to be kept as a copy (agents call this)."""

        def send(wire: Wire, answer: dict[str, Any]) -> None:
            if not answer.get("held"):
                wire.send_file(file, offset=0, size_bytes=offer.size_bytes)
                self._check(wire.receive_answer())

        self._exchange({"request": "put", **offer.to_json()}, send)

    def stop(self) -> None:
        """Have the agent finish its writes and go."""
        self._request({"request": "stop"})

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _request(self, header: dict[str, Any]) -> dict[str, Any]:
        return self._exchange(header, lambda _, answer: answer)

    def _exchange(self, header: dict[str, Any], follow: Callable[[Wire, dict[str, Any]], T]) -> T:
        """Send a header, check the answer, and do what follows it on the same connection."""
        try:
            wire, answer = self._ask(header)
            try:
                self._check(answer)
                result = follow(wire, answer)
            except WireError:
                wire.close()
                raise
            except _Refusal:  # the agent has said all; the connection is as good as before
                self._keep(wire)
                raise
        except WireError as error:
            raise self._error(str(error)) from error
        except _Refusal as error:
            raise self._error(str(error)) from None
        self._keep(wire)
        return result

    def _ask(self, header: dict[str, Any]) -> tuple[Wire, dict[str, Any]]:
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return kept, _answer(kept, header)
            except (
                WireClosed
            ):  # the agent ends idle connections, or is another one by now; no request hurts if repeated
                self.close()
        wire = connect(self.address.host, self.address.port, self.address.token, timeout_seconds=self._timeout_seconds)
        return wire, _answer(wire, header)

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            self._idle.append(wire)

    def _check(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise _Refusal(f"answered: {answer['error']}")

    def _error(self, text: str) -> StorageError:
        where = f"{self.address.host}:{self.address.port}"
        return StorageError(f"the checkpoint agent at {where} {text}", shared_by_all_ranks=False)


class _Refusal(Exception):
    """The agent understood and said no."""


def _answer(wire: Wire, header: dict[str, Any]) -> dict[str, Any]:
    try:
        wire.send(header)
        return wire.receive_answer()
    except WireError:
        wire.close()
        raise


@functools.cache
def _shared_client(address: AgentAddress) -> AgentClient:
    return AgentClient(address)


@dataclass(frozen=True)
class AgentSource:
    """A blob on another node as a `sums.Source`. `root` is "memory" or "disk", `path` counts from it."""

    address: AgentAddress
    root: str
    path: str
    parallel_reads: int = 2

    @property
    def name(self) -> str:
        return f"{self.address.host}:{self.path}"

    def read(self, offset: int, size_bytes: int) -> bytearray:
        return _shared_client(self.address).read(self.root, self.path, offset, size_bytes)


def ensure_agent(memory_root: Path, *, disk_root: Path | None, host: str, watch_pid: int) -> AgentAddress:
    """The agent of this node and run, living until `watch_pid` ends: the one there is if it fits, or a new one.

    Raises StorageError when it does not come up.
    """
    memory_root = memory_root.resolve()
    roots = {"memory": str(memory_root), "disk": None if disk_root is None else str(disk_root.resolve())}
    found = read_address(memory_root)
    if found is not None:
        if found.host == host and _adopt(found, roots, watch_pid):
            return found
        _remove_unfit(memory_root, found)
    _start(memory_root, {"roots": roots, "host": host, "watch_pid": watch_pid})
    started = read_address(memory_root)
    if started is None:
        raise StorageError(f"the checkpoint agent left no address in {memory_root}", shared_by_all_ranks=False)
    return started


def read_address(memory_root: Path) -> AgentAddress | None:
    """Where this node's agent listens, or listened before it was killed; None when it went in good order."""
    try:
        value = json.loads((memory_root / ADDRESS_FILE).read_bytes())
        return AgentAddress(str(value["host"]), int(value["port"]), str(value["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adopt(address: AgentAddress, roots: Mapping[str, str | None], watch_pid: int) -> bool:
    """Whether the agent at `address` is alive, of this version and these roots, and now watches `watch_pid`."""
    client = AgentClient(address, timeout_seconds=_PING_SECONDS)
    try:
        pong = client.ping()
        if pong.get("version") != hypershard.__version__ or pong.get("roots") != roots:
            return False
        client.watch(watch_pid)  # refused by one that is about to go
        return True
    except StorageError:
        return False
    finally:
        client.close()


def _remove_unfit(memory_root: Path, address: AgentAddress) -> None:
    """End an agent of another version, host or roots, and one that does not answer."""
    client = AgentClient(address, timeout_seconds=_PING_SECONDS)
    try:
        client.stop()
    except StorageError:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            _kill_agent(memory_root, int(json.loads((memory_root / ADDRESS_FILE).read_bytes())["pid"]))
    finally:
        client.close()


def _kill_agent(memory_root: Path, pid: int) -> None:
    """Kill process `pid`, but only if it is the agent of `memory_root`: numbers are given out again."""
    handle = os.pidfd_open(pid)
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        at = Path(f"/proc/{pid}/cwd").readlink()
        if AGENT_MODULE.encode() in words and at == memory_root.resolve():
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def _start(memory_root: Path, settings: Mapping[str, Any]) -> None:
    """Start an agent that outlives this process, and wait until it listens."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    package = str(Path(hypershard.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    with readable_errors(memory_root / LOG_FILE, "writing"), open(memory_root / LOG_FILE, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", AGENT_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # no Ctrl-C and no signal to the trainers' group reaches it
        )
    with process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.close()
        line = _first_line(process.stdout.fileno(), time.monotonic() + _START_SECONDS)
        if line != b"ready":
            process.kill()
            raise StorageError(
                f"the checkpoint agent of {memory_root} did not start: {_why(memory_root, line)}",
                shared_by_all_ranks=False,
            )


def _first_line(descriptor: int, deadline: float) -> bytes | None:
    """What is said first, b"" if nothing before the end, None if nothing before `deadline` (`time.monotonic`)."""
    content = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not content.endswith(b"\n"):
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0 or not poll.poll(left_seconds * 1000):
            return None
        piece = os.read(descriptor, 4096)
        if not piece:
            break
        content += piece
    return content.strip()


def _why(memory_root: Path, line: bytes | None) -> str:
    if line is None:
        return f"it said nothing for {_START_SECONDS:.0f} seconds"
    if line:
        return line.decode(errors="replace")
    with contextlib.suppress(OSError):
        lines = (memory_root / LOG_FILE).read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "it ended without a word"
