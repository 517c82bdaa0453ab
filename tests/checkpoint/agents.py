"""Agents, blobs and bad networks for tests of the agent."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypershard.checkpoint.agent_client import AgentAddress, AgentClient
from hypershard.checkpoint.blob import HEAD_BYTES, BlobTable, head_bytes, table_bytes
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.memory_files import claim, rank_folder
from hypershard.checkpoint.sums import sum_of

FIRST, SECOND = Lineage(1, "aa"), Lineage(2, "bb")
ROOM_BYTES = 2**16  # of a slot beside its payload


def make_blob(
    root: Path, *, rank: int, step: int, lineage: Lineage = FIRST, kind: str = "own", payload_bytes: int = 2**20
) -> str:
    """Write a whole blob with bytes that only this save has to its rank's slot-0; its path from `root`."""
    payload = random.Random(f"{rank} {step} {lineage}").randbytes(payload_bytes)
    table = table_bytes(
        BlobTable("job", lineage, step, rank, 2, rank, 2, "2026-01-01", {"step": step}, (), sum_of(payload))
    )
    path = rank_folder(root, kind, rank) / "slot-0"
    path.unlink(missing_ok=True)
    claim(path, payload_bytes + ROOM_BYTES)
    with open(path, "r+b") as file:
        file.seek(HEAD_BYTES)
        file.write(payload + table)
        file.seek(0)
        file.write(head_bytes(table, payload_bytes=payload_bytes))
    return path.relative_to(root).as_posix()


def start_agent(
    root: Path, *, watch_pid: int, host: str = "127.0.0.1", disk: Path | None = None, timeout_seconds: float = 10
) -> AgentAddress:
    """An agent as its documentation says: settings on standard input, then "ready"."""
    root.mkdir(parents=True, exist_ok=True)
    roots = {"memory": str(root), "disk": None if disk is None else str(disk)}
    settings = {"roots": roots, "host": host, "watch_pid": watch_pid, "timeout_seconds": timeout_seconds}
    done = subprocess.run(
        [sys.executable, "-m", "hypershard.checkpoint.agent"],
        input=json.dumps(settings) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "ready\n", done
    return address_of(root)


def address_of(root: Path) -> AgentAddress:
    value = json.loads((root / "agent.json").read_text())
    return AgentAddress(value["host"], value["port"], value["token"])


def pid_of(address: AgentAddress) -> int:
    client = AgentClient(address, timeout_seconds=10)
    try:
        return int(client.ping()["pid"])
    finally:
        client.close()


def wait_for(what: Callable[[], bool]) -> None:
    """Until `what` holds. Fails after a time that only a hang takes."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited for a minute in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Spoil:
    """What a bad network does to the bytes of each connection on their way to the agent, counted from its start."""

    flip_at: int | None = None
    cut_after: int | None = None
    stall_after: int | None = None
    pause_seconds: float = 0.0  # after each 256 KiB


class Proxy:
    """A network between clients and an agent. `seen` is all that went through, both ways."""

    def __init__(self, target: AgentAddress, spoil: Spoil | None = None):
        self.spoil = spoil or Spoil()
        self.seen = bytearray()
        self.num_forwarded = 0
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = AgentAddress("127.0.0.1", self._listener.getsockname()[1], target.token)
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self.drop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def num_connections(self) -> int:
        return len(self._open) // 2

    def drop(self) -> None:
        """End all connections there are."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                agent = socket.create_connection((self._target.host, self._target.port))
                self._open += [client, agent]
                threading.Thread(target=self._forward, args=(client, agent, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(agent, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, to_agent: bool) -> None:
        num_passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(2**16)):
                if to_agent:
                    data = self._spoiled(data, num_passed)
                self.seen += data
                sink.sendall(data)
                num_passed += len(data)
                if to_agent:
                    self.num_forwarded += len(data)
        for one in (source, sink):  # closed by the other direction's thread too; a closed one does not mind
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _spoiled(self, data: bytearray, before: int) -> bytearray:
        spoil = self.spoil
        if spoil.flip_at is not None and 0 <= spoil.flip_at - before < len(data):
            data[spoil.flip_at - before] ^= 1
        if spoil.cut_after is not None and before + len(data) > spoil.cut_after:
            raise ConnectionResetError
        while spoil.stall_after is not None and before + len(data) > spoil.stall_after:
            time.sleep(0.05)
        if before // 2**18 != (before + len(data)) // 2**18:
            time.sleep(spoil.pause_seconds)
        return data


def sleeper() -> subprocess.Popen[bytes]:
    """A process for an agent to watch."""
    return subprocess.Popen(["sleep", "600"])
