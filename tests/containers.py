"""Containers as SageMaker and Kubernetes start them, for tests: process 1 of namespaces of its own on a node.

Each has its own processes, mounts, host name and /etc/hosts, and at the real path an /opt/ml with the files that the
platform writes. The disk is this machine's: what lies elsewhere is seen by all, as a shared file system is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.integration.processes import WAIT_SECONDS, environment
from tests.nodes import Node

# What else lies in /opt (it may hold this Python) stays where it is.
_ENTER = """set -e
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount --rbind /opt "$1/opt"
mount -t tmpfs tmpfs /opt
for folder in "$1"/opt/*/; do
  name=$(basename "$folder")
  if [ -d "$folder" ] && [ "$name" != ml ]; then mkdir "/opt/$name"; mount --rbind "$folder" "/opt/$name"; fi
done
mkdir /opt/ml
mount --bind "$1/ml" /opt/ml
shift 2
exec "$@"
"""


class Container:
    """One host's container. Its log goes to a file; `ml` is its /opt/ml."""

    def __init__(self, node: Node, folder: Path, *, hosts: Mapping[str, str], name: str):
        self.node, self.name, self._folder = node, name, folder
        self.ml = folder / "ml"
        self._log = folder / "log"
        self._process: subprocess.Popen[Any] | None = None
        (folder / "opt").mkdir(parents=True)
        (self.ml / "input/config").mkdir(parents=True)
        (self.ml / "output").mkdir()
        lines = [f"{address} {host}" for host, address in {"localhost": "127.0.0.1", **hosts}.items()]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def as_host_of_sagemaker(self, hosts: Sequence[str], hyperparameters: Mapping[str, str]) -> None:
        """Write the files that the platform does."""
        resources = {"current_host": self.name, "hosts": list(hosts), "network_interface_name": "eth0"}
        self._configure("resourceconfig", resources)
        self._configure("hyperparameters", hyperparameters)

    def _configure(self, name: str, value: Mapping[str, Any]) -> None:
        (self.ml / "input/config" / f"{name}.json").write_text(json.dumps(value))

    def start(self, argv: Sequence[str], *, host_name: str) -> None:
        apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        words = [*apart, "sh", "-c", _ENTER, "sh", str(self._folder), host_name, *argv]
        with open(self._log, "ab") as log:
            self._process = self.node.start(
                words, environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def processes(self) -> dict[int, list[str]]:
        """Command lines of everything in the container, by process id as this machine counts; process 1 comes first."""
        assert self._process is not None
        found: dict[int, list[str]] = {}
        waiting = [self._process.pid]
        while waiting:
            pid = waiting.pop(0)
            with contextlib.suppress(OSError):  # ended meanwhile
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
                # A node's processes have two ids, the machine's and the node's; a container's have a third.
                if _num_ids(pid) == _num_ids(os.getpid()) + 2:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        return found

    def ranks(self) -> list[int]:
        return [
            pid
            for pid, words in self.processes().items()
            if "hypershard.cli.main" in words and "torch.distributed.run" not in words
        ]

    def kill_ranks(self) -> None:
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to process 1, as the platform does."""
        os.kill(next(iter(self.processes())), number)

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def failure(self) -> str | None:
        path = self.ml / "output/failure"
        return path.read_text() if path.exists() else None


def _num_ids(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return len(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()) - 1


ENTRYPOINT = [sys.executable, str(Path(__file__).parents[1] / "docker" / "entrypoint.py")]
