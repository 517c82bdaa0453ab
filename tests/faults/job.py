"""One start of a training on the nodes of a site, as a scheduler makes it, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.place import Site
from tests.integration import processes

from hypershard.checkpoint.agent_client import AGENT_MODULE
from hypershard.metrics.sinks import read_json_lines

_LAUNCHER = Path(__file__).with_name("launcher.py")
_APPEAR_SECONDS = 20.0


class Violation(AssertionError):
    """The program did what it must not."""


class Launchers:
    """One launcher per node. Agents live as long as theirs, so a kept launcher keeps what the agents serve."""

    def __init__(self, site: Site):
        self._site = site
        self._of_node: dict[int, subprocess.Popen[str]] = {}

    def start(self, number: int, argv: Sequence[str], ranks: Sequence[dict[str, Any]]) -> None:
        launcher = self._of_node.get(number)
        if launcher is None or launcher.poll() is not None:
            env = processes.environment() | self._site.rank_environment()
            env |= {"GLOO_SOCKET_IFNAME": "eth0", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1"}
            env["TOKENIZERS_PARALLELISM"] = "false"
            words = [sys.executable, "-P", str(_LAUNCHER)]
            launcher = self._site.nodes[number].start(words, env, stdin=subprocess.PIPE, text=True)
            self._of_node[number] = launcher
        assert launcher.stdin is not None
        launcher.stdin.write(json.dumps({"argv": list(argv), "ranks": list(ranks)}) + "\n")
        launcher.stdin.flush()

    def end(self, numbers: Iterable[int] | None = None) -> None:
        """Let them end with their ranks."""
        for number in list(self._of_node) if numbers is None else numbers:
            if launcher := self._of_node.pop(number, None):
                assert launcher.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    launcher.stdin.close()


class Job:
    """`num_nodes` x `ranks_per_node` processes of `hypershard train` with `flags`; logs and exit codes in `folder`."""

    def __init__(self, site: Site, folder: Path, *, shape: tuple[int, int], flags: dict[str, Any], port: int):
        self.site = site
        self.folder = folder
        self.num_nodes, self.ranks_per_node = shape
        self.run_dir = Path(flags["run_dir"])
        self.has_memory = flags["in_memory_checkpointing_freq"] > 0
        self._argv = processes.command(**flags)
        self._port = port
        self.started_at = 0.0
        self.lost_nodes: set[int] = set()

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def start(self, launchers: Launchers) -> None:
        self.folder.mkdir(parents=True)
        self.started_at = time.time()
        for node in range(self.num_nodes):
            ranks = [self._rank(node, local) for local in range(self.ranks_per_node)]
            launchers.start(node, self._argv, ranks)

    def _rank(self, node: int, local: int) -> dict[str, Any]:
        rank = node * self.ranks_per_node + local
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.site.nodes[0].address,
            "MASTER_PORT": str(self._port),
        }
        return {"env": env, "log": str(self.folder / f"rank-{rank}.log"), "exit": str(self._exit(rank))}

    def _exit(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.exit"

    # --- what it says ----------------------------------------------------------------------------------------

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; a rank of a node that was lost never says one."""
        found = {}
        for rank in range(self.world_size):
            with contextlib.suppress(FileNotFoundError):
                found[rank] = int(self._exit(rank).read_text())
        return found

    def running(self) -> set[int]:
        """Ranks that have not ended and whose node has not been lost."""
        here = {rank for rank in range(self.world_size) if self.node_of(rank) not in self.lost_nodes}
        return here - self.codes().keys()

    def log(self) -> str:
        texts = []
        for rank in range(self.world_size):
            with contextlib.suppress(FileNotFoundError):
                texts.append((self.folder / f"rank-{rank}.log").read_text(errors="replace"))
        return "\n".join(texts)

    def events(self) -> list[dict[str, Any]]:
        """What this start wrote to events.jsonl."""
        return [one for one in read_json_lines(self.run_dir / "events.jsonl") if one["at"] >= self.started_at]

    def begun_at(self) -> int | None:
        """The step this start went on from; None when it did not come so far."""
        return next((int(one["step"]) for one in self.events() if one["event"] == "started"), None)

    def step(self) -> int:
        """The last step that is written down, of this start or an earlier one."""
        return max((int(record["step"]) for record in processes.steps(self.run_dir)), default=0)

    def signs_of_life(self) -> tuple[Any, ...]:
        """Differs from the last time when anything has been written."""
        paths = [self.run_dir / "metrics.jsonl", self.run_dir / "events.jsonl", *sorted(self.folder.iterdir())]
        return tuple((path.name, path.stat().st_size) for path in paths if path.exists())

    # --- its processes ---------------------------------------------------------------------------------------

    def rank_pids(self) -> dict[int, int]:
        found = {}
        for node in self.site.nodes:
            for pid, words in node.processes().items():
                if "hypershard.cli.main" in words:
                    with contextlib.suppress(OSError):
                        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                        found[int(dict(pair.partition("=")[::2] for pair in pairs)["RANK"])] = pid
        return found

    def agent_pids(self) -> dict[int, int]:
        """One per node, where there is one."""
        found = {}
        for node in self.site.nodes:
            for pid, words in node.processes().items():
                if AGENT_MODULE in words:
                    found[node.number] = pid
        return found

    def send(self, ranks: Iterable[int], number: signal.Signals) -> bool:
        """Whether all of `ranks` were there to get the signal, which are waited for if they have just been started."""
        wanted, deadline = set(ranks), time.monotonic() + _APPEAR_SECONDS
        while not wanted <= (pids := self.rank_pids()).keys():
            if wanted & self.codes().keys() or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        for rank in wanted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], number)
        return True

    def wait(self, *, seconds: float, tick: Callable[[], None] = lambda: None) -> bool:
        """Whether all ranks that can have ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            tick()
            time.sleep(0.05)
        return True

    def end_all(self, *, seconds: float = 60, tick: Callable[[], None] = lambda: None) -> None:
        """Until the ranks that are left have noticed that others are gone, which those must that have met.

        Before that nobody but a launcher knows: torch's rendezvous waits for minutes, and launchers end the rest.
        """
        if self.begun_at() is None:
            self.wait(seconds=1, tick=tick)
            self.end()
        elif not self.wait(seconds=seconds, tick=tick):
            raise Violation(f"ranks {sorted(self.running())} do not notice that others are gone:\n{self.dump_stacks()}")

    def end(self) -> None:
        """As a scheduler ends a job of which something is lost."""
        for pid in self.rank_pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        if not self.wait(seconds=30):
            raise Violation(f"ranks {sorted(self.running())} outlived SIGKILL")

    def dump_stacks(self) -> str:
        """End the ranks that are left by SIGABRT, upon which Python writes all its stacks; the logs' last lines."""
        left = sorted(self.running())
        for rank, pid in self.rank_pids().items():
            if rank in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGABRT)
        self.wait(seconds=20)
        tails = [
            f"--- rank {rank}\n" + "\n".join((self.folder / f"rank-{rank}.log").read_text().splitlines()[-80:])
            for rank in left
        ]
        return "\n".join(tails)
