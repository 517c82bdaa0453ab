"""A node dies with its memory; the job goes on from the copies that another node kept."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.integration.processes import SMALL, WAIT_SECONDS, environment, history, steps
from tests.nodes import Node, cluster, nodes_available

from hypershard.metrics.sinks import read_json_lines

reason = nodes_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=reason or "")]

FLAGS = {**SMALL, "max_steps": 60, "checkpoint_freq": "none", "in_memory_checkpointing_freq": 5}


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with cluster(2) as made:
        yield made


class Job:
    """One start of the training: `ranks_per_node` ranks on each of `nodes`, started as torchrun starts them."""

    def __init__(self, nodes: Sequence[Node], run_dir: Path, logs: Path, *, ranks_per_node: int, **flags: object):
        settings = {**FLAGS, "run_dir": run_dir, **flags}
        words = [f"--{name}={value}" for name, value in settings.items()]
        argv = [sys.executable, "-m", "hypershard.cli.main", "train", *words]
        logs.mkdir()
        self.exits: list[Path] = []
        self.logs: list[Path] = []
        self.launchers: list[subprocess.Popen[str]] = []
        self.run_dir = run_dir
        self.num_starts = len(restored(run_dir))
        for number, node in enumerate(nodes):
            ranks = []
            for local_rank in range(ranks_per_node):
                rank = number * ranks_per_node + local_rank
                self.exits.append(logs / f"{rank}.exit")
                self.logs.append(logs / f"{rank}.log")
                env = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(nodes) * ranks_per_node),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(ranks_per_node),
                    "MASTER_ADDR": nodes[0].address,
                    "MASTER_PORT": "29400",
                    "GLOO_SOCKET_IFNAME": "eth0",
                }
                ranks.append({"env": env, "log": str(self.logs[-1]), "exit": str(self.exits[-1])})
            launcher = node.start(
                [sys.executable, "-m", "tests.faults.launcher"], environment(), stdin=subprocess.PIPE, text=True
            )
            assert launcher.stdin is not None
            launcher.stdin.write(json.dumps({"argv": argv, "ranks": ranks}) + "\n")
            launcher.stdin.flush()
            self.launchers.append(launcher)

    def wait_for_start(self) -> int:
        """The step that this start goes on from."""
        self._wait(lambda: len(restored(self.run_dir)) > self.num_starts)
        return restored(self.run_dir)[-1]

    def wait_for_step(self, step: int) -> None:
        self.wait_for_start()
        self._wait(lambda: any(record["step"] >= step for record in steps(self.run_dir)))

    def wait_for_saves(self, number: int) -> None:
        """Of a busy machine's saves some are postponed, so steps say little of them."""
        self._wait(lambda: len(saves(self.run_dir)) >= number)

    def finish(self) -> None:
        self._wait(lambda: all(path.exists() for path in self.exits))
        assert [path.read_text() for path in self.exits] == ["0"] * len(self.exits), self.said()
        for launcher in self.launchers:
            assert launcher.stdin is not None
            launcher.stdin.close()
            launcher.wait(timeout=WAIT_SECONDS)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.logs if path.exists())

    def _wait(self, is_reached) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached():
            failed = [path for path in self.exits if path.exists() and path.read_text() != "0"]
            assert not failed and time.monotonic() < deadline, self.said()
            time.sleep(0.02)


def restored(run_dir: Path) -> list[int]:
    """The steps that the starts of a run went on from."""
    return [record["step"] for record in read_json_lines(run_dir / "events.jsonl") if record["event"] == "started"]


def saves(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_json_lines(run_dir / "events.jsonl") if record["event"] == "saved"]


def last_two_saved(run_dir: Path) -> list[int]:
    """The newest save may not have reached the other node when this one was lost; the one before it had."""
    return saves(run_dir)[-2:]


def test_a_lost_node_costs_no_more_than_one_save(nodes: list[Node], tmp_path: Path) -> None:
    undisturbed = Job(nodes, tmp_path / "whole", tmp_path / "logs0", ranks_per_node=1)
    undisturbed.finish()
    run_dir = tmp_path / "run"
    for number, step in enumerate((18, 33)):
        job = Job(nodes, run_dir, tmp_path / f"logs{number + 1}", ranks_per_node=1, resume_from_checkpoint="auto")
        job.wait_for_step(step)
        job.wait_for_saves(3)
        lost = nodes[1 - number]
        lost.lose()
        for node in nodes:
            if node is not lost:
                node.kill("hypershard.cli.main")
                node.kill("tests.faults.launcher")
        saved = last_two_saved(run_dir)
        lost.come_back()
        job = Job(nodes, run_dir, tmp_path / f"logs{number + 3}", ranks_per_node=1, resume_from_checkpoint="auto")
        assert job.wait_for_start() in saved, job.said()
        for node in nodes:
            node.kill("hypershard.cli.main")
            node.kill("tests.faults.launcher")
    job = Job(nodes, run_dir, tmp_path / "logs9", ranks_per_node=1, resume_from_checkpoint="auto")
    job.finish()
    assert history(run_dir) == history(tmp_path / "whole")
    assert all(not list(node.shm.glob("hypershard-*/*")) for node in nodes), "a finished run leaves nothing in memory"


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_a_lost_node_held_is_loaded_by_any_number_of_ranks(
    nodes: list[Node], tmp_path: Path, num_ranks: int
) -> None:
    """Two nodes of two ranks; then the second alone, whose memory holds its own blobs and copies of the first one's."""
    run_dir = tmp_path / "run"
    job = Job(nodes, run_dir, tmp_path / "logs", ranks_per_node=2, train_batch_size=1, max_steps=400)
    job.wait_for_saves(3)
    nodes[0].lose()
    nodes[1].kill("hypershard.cli.main")
    nodes[1].kill("tests.faults.launcher")
    saved = last_two_saved(run_dir)
    flags = {
        "train_batch_size": 1,
        "max_steps": saved[-1] + 8,
        "sharding_strategy": "hybrid" if num_ranks == 2 else "full",
    }
    job = Job(nodes[1:], run_dir, tmp_path / "more", ranks_per_node=num_ranks, resume_from_checkpoint="auto", **flags)
    job.finish()
    start = restored(run_dir)[-1]
    assert start in saved
    tokens = {record["step"]: record["tokens"] for record in steps(run_dir)}
    context = int(SMALL["max_context_width"])
    assert tokens[start + 1] - tokens[start] == num_ranks * context, "no sample is lost or repeated"
