"""How fast a blob gets into another node's memory and back, beside plain sockets that move the same file.

One program for both nodes: `python -m checkpointing.peer '{"role": "keeper", ...}'` on the node that keeps the copy,
and "sender" on the other. The nodes are two network and mount namespaces where those can be made (see tests/nodes.py),
else two folders on loopback.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_RANK = 0
_GO = b"g"


def keep(*, root: str, host: str, size_bytes: int) -> None:
    """Start this node's agent, say where it and a plain receiver listen, and serve both until the input ends."""
    from hypershard.checkpoint.agent_client import ensure_agent
    from hypershard.checkpoint.memory_files import claim

    agent = ensure_agent(Path(root), disk_root=None, host=host, watch_pid=os.getpid())
    path = Path(root) / "plain"
    claim(path, size_bytes)
    with socket.create_server((host, 0)) as server, open(path, "r+b") as file:
        memory = memoryview(mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        print(json.dumps({"agent": asdict(agent), "port": server.getsockname()[1]}), flush=True)
        wire = server.accept()[0]
        while wire.recv(1):
            receive(wire, memory)
            wire.sendall(_GO)
            wire.recv(1)
            wire.sendfile(file, 0, size_bytes)


def receive(wire: socket.socket, memory: memoryview) -> None:
    at = 0
    while at < len(memory):
        num_bytes = wire.recv_into(memory[at:])
        if not num_bytes:
            raise ConnectionError("the other node hung up")
        at += num_bytes


def send(*, root: str, host: str, agent: dict[str, Any], port: int, size_bytes: int, rounds: int) -> None:
    """Move a blob there and back by both ways in turn; prints seconds by name, per round."""
    from hypershard.checkpoint.agent_client import AgentAddress, AgentClient, AgentSource, ensure_agent
    from hypershard.checkpoint.blob import HEAD_BYTES
    from hypershard.checkpoint.sums import damage_of

    target = AgentAddress(**agent)
    own = AgentClient(ensure_agent(Path(root), disk_root=None, host=host, watch_pid=os.getpid()))
    blob = _Blob(Path(root), size_bytes)
    AgentClient(target).reserve({_RANK: blob.path.stat().st_size})
    wire = socket.create_connection((target.host, port))
    room = memoryview(bytearray(size_bytes))
    seconds: dict[str, list[float]] = {"socket": [], "copy": [], "socket back": [], "copy back": []}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        began_at = time.perf_counter()
        result = action()
        seconds[name].append(time.perf_counter() - began_at)
        return result

    def plain() -> None:
        wire.sendall(_GO)
        with open(blob.path, "rb") as file:
            wire.sendfile(file, 0, size_bytes)
        wire.recv(1)

    def plain_back() -> None:
        wire.sendall(_GO)
        receive(wire, room)

    for step in range(1, rounds + 2):
        table = blob.commit(step)
        timed("socket", plain)
        timed("socket back", plain_back)
        outcome = timed("copy", lambda: own.replicate(str(blob.path.relative_to(root)), [target]))
        assert outcome == [None], outcome
        # Two slots take turns; every round's blob has the same payload.
        held = f"copies/rank-{_RANK:05d}/slot-{(step - 1) % 2}"
        source = AgentSource(target, "memory", held)
        check = functools.partial(damage_of, source, table.payload, start=HEAD_BYTES)
        damage = timed("copy back", check)
        assert damage is None, damage
    print(json.dumps({name: times[1:] for name, times in seconds.items()}))


class _Blob:
    """One tensor of random bytes in a slot, committed anew for each step."""

    def __init__(self, root: Path, size_bytes: int):
        import torch

        from hypershard.checkpoint.memory_files import OWN, rank_folder
        from hypershard.checkpoint.slots import SlotPool, slot_bytes
        from hypershard.checkpoint.snapshot import take_snapshot

        snapshot = take_snapshot({"model/all": torch.rand(size_bytes // 4)})
        self._items = snapshot.items()
        size = slot_bytes(self._items, num_table_bytes=4096)
        pool = SlotPool(rank_folder(root, OWN, _RANK), num_slots=1, size_bytes=size, num_kept=0, on_gpu=False)
        self._slot = pool.slots[0]
        self._slot.copy(snapshot, self._items, None)
        assert self._slot.path is not None
        self.path = self._slot.path

    def commit(self, step: int) -> Any:
        from hypershard.checkpoint.blob import BlobTable
        from hypershard.checkpoint.lineage import Lineage
        from hypershard.checkpoint.manifest import now
        from hypershard.checkpoint.slots import payload_bytes

        def table(payload: Any) -> BlobTable:
            return BlobTable("bench", Lineage(1, "bench"), step, _RANK, 1, 0, 1, now(), {}, tuple(self._items), payload)

        return self._slot.commit(payload_bytes(self._items), table)


def measure(size_bytes: int, rounds: int) -> dict[str, Any]:
    """Both programs on two nodes; seconds by name and what the nodes were."""
    with _two_nodes(size_bytes) as (start, roots, hosts, what):
        here = {"root": roots[1], "host": hosts[1], "size_bytes": size_bytes}
        keeper = start(1, {"role": "keeper", **here})
        assert keeper.stdin is not None and keeper.stdout is not None
        try:
            said = json.loads(keeper.stdout.readline())
            there = {"root": roots[0], "host": hosts[0], "size_bytes": size_bytes, "rounds": rounds}
            sender = start(0, {"role": "sender", **there, **said})
            text, _ = sender.communicate(timeout=600)
            return {"nodes": what, "size_bytes": size_bytes, "seconds": json.loads(text)}
        finally:
            keeper.stdin.close()
            keeper.wait(timeout=60)


_Starter = Callable[[int, dict[str, Any]], "subprocess.Popen[str]"]


@contextlib.contextmanager
def _two_nodes(size_bytes: int) -> Iterator[tuple[_Starter, list[str], list[str], str]]:
    """How to start the program on node 0 and 1, the nodes' folders and addresses, and what they are."""
    try:
        from tests.nodes import cluster, nodes_available

        reason = nodes_available()
    except ImportError as error:
        reason = str(error)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def command(arguments: dict[str, Any]) -> list[str]:
        return [sys.executable, "-m", "checkpointing.peer", json.dumps(arguments)]

    if reason is None:
        with cluster(2, shm_bytes=4 * size_bytes + 2**26) as nodes:
            addresses = [node.address for node in nodes]
            roots = ["/dev/shm/bench"] * 2
            for node in nodes:
                node.run(["mkdir", "/dev/shm/bench"])

            def start(number: int, arguments: dict[str, Any]) -> subprocess.Popen[str]:
                return nodes[number].start(command(arguments), environment, **pipes)

            yield start, roots, addresses, "two network and memory namespaces"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        roots = [str(Path(folder) / name) for name in ("a", "b")]
        for root in roots:
            Path(root).mkdir()

        def start_here(_: int, arguments: dict[str, Any]) -> subprocess.Popen[str]:
            return subprocess.Popen(command(arguments), env=environment, **pipes)

        yield start_here, roots, ["127.0.0.1"] * 2, f"two folders on loopback ({reason})"


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"keeper": keep, "sender": send}[given.pop("role")](**given)
