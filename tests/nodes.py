"""Real nodes on one machine, for tests: each has its own network, its own /dev/shm and its own processes.

    hub        a network namespace with a bridge; node i is plugged into its port `port<i>`
    node i     a network namespace with eth0 = 10.77.0.<i+1>, and in it a PID and mount namespace with a small tmpfs on
               /dev/shm. All lives as long as process 1 of the PID namespace: killing that is pulling the plug.

Needs root, `ip`, `tc`, `unshare`, `nsenter` and `setpriv`. Nothing is seen by the machine's own network.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_NETWORKS = Path("/run/netns")
_NAME = re.compile(r"hs-(\d+)-\w+")  # ours: the test process's id is in it, so what a killed one left is known
_PLUG_SECONDS = 20.0
# Process 1 of a node: mounts its memory, says so, then waits for orphans that end.
_FIRST = 'mount -t tmpfs -o size="$1",mode=1777 tmpfs /dev/shm && echo up && while :; do sleep 3600 & wait; done'


@cache
def nodes_available() -> str | None:
    """Why there can be no nodes here, or None when there can."""
    missing = [program for program in ("ip", "tc", "unshare", "nsenter", "setpriv") if shutil.which(program) is None]
    if missing:
        return f"nodes need {', '.join(missing)}"
    try:
        with cluster(1, shm_bytes=2**20):
            return None
    except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"nodes cannot be made here: {said.strip()}"


class Node:
    """One node of a cluster. Use `cluster` to make some."""

    def __init__(self, number: int, shm_bytes: int):
        self.number = number
        self.address = f"10.77.0.{number + 1}"
        self._shm_bytes = shm_bytes
        self._network = _name(str(number))
        self._port = f"port{number}"
        self._holder: subprocess.Popen[str] | None = None
        self._first_pid = 0
        self._started: list[subprocess.Popen[Any]] = []
        self._plug_in()
        self._boot()

    @property
    def is_up(self) -> bool:
        return self._holder is not None

    def _plug_in(self) -> None:
        network, port, hub = self._network, self._port, _hub()
        _ip("netns", "add", network)
        # The same hardware address after a loss: others need not forget what they know of this node.
        inside = ["eth0", "address", f"02:00:0a:4d:00:{self.number + 1:02x}", "netns", network]
        _ip("link", "add", *inside, "type", "veth", "peer", "name", port, "netns", hub)
        _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", network, "address", "add", f"{self.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", network, "link", "set", interface, "up")

    @property
    def shm(self) -> Path:
        """The node's /dev/shm as this machine sees it; another one after `come_back`."""
        return Path(f"/proc/{self._first_pid}/root/dev/shm")

    def _boot(self) -> None:
        enter = ["nsenter", f"--net={_NETWORKS / self._network}"]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words = ["setpriv", "--pdeathsig", "KILL", *enter, *apart, "sh", "-c", _FIRST, "sh", str(self._shm_bytes)]
        holder = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            holder.kill()
            raise RuntimeError(f"a namespace with memory of its own was refused: {holder.communicate()[1]}")
        self._holder = holder
        self._first_pid = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])

    def _inside(self, argv: Sequence[str]) -> list[str]:
        if not self.is_up:
            raise RuntimeError(f"node {self.number} is lost; call come_back first")
        here = str(Path.cwd())
        return ["nsenter", f"--target={self._first_pid}", "--net", "--pid", "--mount", f"--wd={here}", "--", *argv]

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this node; `options` are Popen's. Its exit status is the program's.

        What is returned is `nsenter`, which passes no signals on: to end the program, use `kill`.
        """
        process = subprocess.Popen(self._inside(argv), env=None if env is None else dict(env), **options)
        self._started.append(process)
        return process

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this node to its end, with what it said as text."""
        result = subprocess.run(
            self._inside(argv), env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check:
            assert result.returncode == 0, f"{argv}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def processes(self) -> dict[int, list[str]]:
        """Command lines of all processes on this node but the first, by their numbers as this machine counts."""
        if not self.is_up:
            return {}
        namespace = Path(f"/proc/{self._first_pid}/ns/pid").readlink()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(folder.name) != self._first_pid and (folder / "ns" / "pid").readlink() == namespace:
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                    if words and words != ["sleep", "3600"]:  # no words: ended, not yet reaped
                        found[int(folder.name)] = words
        return found

    def kill(self, part_of_command: str) -> int:
        """SIGKILL this node's processes with such a word in their command line; how many there were."""
        killed = 0
        for pid, words in self.processes().items():
            if any(part_of_command in word for word in words):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    def cut_off(self) -> None:
        """Take the node off the network, without a word to anybody; it goes on running."""
        _ip("-n", _hub(), "link", "set", self._port, "down")

    def reconnect(self) -> None:
        _ip("-n", _hub(), "link", "set", self._port, "up")

    def slow_down(self, bytes_per_second: int) -> None:
        """What this node sends leaves it at such a rate from now on."""
        rate = ["rate", f"{bytes_per_second * 8}bit", "burst", "64kb", "latency", "200ms"]
        words = ["tc", "-n", self._network, "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate]
        subprocess.run(words, check=True, capture_output=True)

    def lose(self) -> None:
        """Cut the network first, so that no connection is closed in good order; then all processes and memory go."""
        self.cut_off()
        self._end()
        _ip("-n", _hub(), "link", "delete", self._port)
        _remove_network(self._network)

    def come_back(self) -> None:
        """As after a new start of the machine, or as another one in its place: no process, /dev/shm empty."""
        self._plug_in()
        self._boot()

    def _end(self) -> None:
        holder, self._holder = self._holder, None
        if holder is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first_pid, signal.SIGKILL)  # the kernel kills the rest of its namespace before it is gone
        holder.communicate(timeout=_PLUG_SECONDS)
        for process in self._started:
            process.wait(timeout=_PLUG_SECONDS)
        self._started.clear()

    def close(self) -> None:
        self._end()
        _remove_network(self._network)


@contextlib.contextmanager
def cluster(num_nodes: int, *, shm_bytes: int = 256 * 2**20) -> Iterator[list[Node]]:
    """`num_nodes` nodes that reach each other at `Node.address`. One cluster at a time in a test process."""
    _remove_stale()
    _ip("netns", "add", _hub())
    nodes: list[Node] = []
    try:
        _ip("-n", _hub(), "link", "add", "bridge", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        _ip("-n", _hub(), "link", "set", "bridge", "up")
        for number in range(num_nodes):
            nodes.append(Node(number, shm_bytes))
        yield nodes
    finally:
        for node in nodes:
            node.close()
        for name in _own_networks():  # a node that was refused half-way is in no list
            _remove_network(name)


def _name(what: str) -> str:
    return f"hs-{os.getpid()}-{what}"


def _hub() -> str:
    return _name("hub")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _own_networks() -> list[str]:
    return [path.name for path in _NETWORKS.glob(f"hs-{os.getpid()}-*")]


def _remove_stale() -> None:
    """Remove what test processes that were killed left behind. (Their nodes' processes died with them.)"""
    for path in _NETWORKS.glob("hs-*"):
        owner = _NAME.fullmatch(path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove_network(path.name)


def _remove_network(name: str) -> None:
    """Delete a network namespace, ending what still runs in it."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + _PLUG_SECONDS
    while (_NETWORKS / name).exists() and time.monotonic() < deadline:
        if not subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False).returncode:
            return
        time.sleep(0.05)
