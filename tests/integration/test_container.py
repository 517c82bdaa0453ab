"""A training job of two hosts in containers: done, stopped, failed, and with a host lost."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.containers import ENTRYPOINT, Container
from tests.integration.processes import SMALL, WAIT_SECONDS, history, steps
from tests.nodes import Node, cluster, nodes_available

from hypershard.metrics.sinks import read_json_lines

reason = nodes_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=reason or "")]

STEPS = 70  # long enough to be interrupted
FLAGS = {**SMALL, "checkpoint_freq": 20, "nproc_per_node": "1"}
SPELLED = {"MAX_STEPS": f'"{STEPS}"', "resume_from_checkpoint": '"auto"'}  # as SageMaker's SDK encodes them


class Job:
    """One start of a job on all `nodes`, as hosts of SageMaker or pods of Kubernetes."""

    def __init__(self, nodes: list[Node], folder: Path, *, are_pods: bool = False, **flags: Any):
        self.run_dir = Path(flags["run_dir"])
        settings = {**FLAGS, **SPELLED, **flags}
        settings.pop("max_steps")
        name_of = "job-{}.job" if are_pods else "algo-{}"
        hosts = {name_of.format(node.number + (not are_pods)): node.address for node in nodes}
        self.containers = [Container(n, folder / h, hosts=hosts, name=h) for n, h in zip(nodes, hosts, strict=True)]
        for index, container in enumerate(self.containers):
            if are_pods:
                words = ["env", f"JOB_COMPLETION_INDEX={index}", "HYPERSHARD_NUM_NODES=2"]
                words += ["HYPERSHARD_MAIN_HOST=job-0.job", *ENTRYPOINT, "train", f"--max_steps={STEPS}"]
                words += [f"--{flag}={value}" for flag, value in {**FLAGS, **flags}.items() if flag != "max_steps"]
                container.start(words, host_name=f"job-{index}")
            else:
                container.as_host_of_sagemaker(list(hosts), {name: str(value) for name, value in settings.items()})
                # All of SageMaker's hosts call themselves so.
                container.start([*ENTRYPOINT, "train"], host_name="aws")

    def until(self, is_reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached():
            assert all(container.is_running() for container in self.containers), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(lambda: any(record["step"] >= step for record in steps(self.run_dir)))

    def ends(self) -> list[int]:
        return [container.wait() for container in self.containers]

    def said(self) -> str:
        return "\n".join(f"--- {container.name}\n{container.log()}" for container in self.containers)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(nodes: list[Node], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The history of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(nodes, folder, run_dir=folder / "run")
    job.until(lambda: all(len(container.ranks()) == 1 for container in job.containers))
    for container in job.containers:
        first = next(iter(container.processes().values()))
        assert first[-2:] == [ENTRYPOINT[1], "train"], "the entrypoint is process 1"
    assert job.ends() == [0, 0], job.said()
    assert [container.failure() for container in job.containers] == [None, None]
    found = history(folder / "run")
    assert len(found) == STEPS
    return found


def test_a_stop_that_one_host_hears_saves_and_the_next_job_goes_on(
    nodes: list[Node], tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    run_dir = tmp_path / "run"
    job = Job(nodes, tmp_path / "first", run_dir=run_dir)
    job.until_step(10)
    job.containers[1].signal(signal.SIGTERM)
    assert job.ends() == [0, 0], job.said()
    assert [container.failure() for container in job.containers] == [None, None]
    events = read_json_lines(run_dir / "events.jsonl")
    assert events[-1]["event"] == "stopped" and events[-1]["reason"] == "SIGTERM" and events[-1]["step"] < STEPS
    job = Job(nodes, tmp_path / "second", run_dir=run_dir)
    assert job.ends() == [0, 0], job.said()
    assert history(run_dir) == undisturbed


def test_pods_that_stop_ask_to_be_started_again(nodes: list[Node], tmp_path: Path) -> None:
    """One of them is evicted; 0 would tell Kubernetes that the other's part of the training is done."""
    run_dir = tmp_path / "run"
    job = Job(nodes, tmp_path / "job", are_pods=True, run_dir=run_dir)
    job.until_step(10)
    job.containers[1].signal(signal.SIGTERM)
    assert job.ends() == [143, 143], job.said()
    assert read_json_lines(run_dir / "events.jsonl")[-1]["reason"] == "SIGTERM"


def test_a_killed_rank_is_started_again_on_all_hosts(
    nodes: list[Node], tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    job = Job(nodes, tmp_path / "job", run_dir=tmp_path / "run", max_restarts="1")
    job.until_step(30)
    job.containers[1].kill_ranks()
    assert job.ends() == [0, 0], job.said()
    assert history(tmp_path / "run") == undisturbed


def test_a_failure_is_explained_on_all_hosts(nodes: list[Node], tmp_path: Path) -> None:
    job = Job(nodes, tmp_path / "job", run_dir=tmp_path / "run", dataset=tmp_path / "nothing.jsonl", max_restarts="2")
    assert job.ends() == [2, 2], job.said()
    for container in job.containers:
        failure = container.failure() or ""
        assert "--dataset=" in failure and "found nothing there" in failure and len(failure) <= 1024, failure


def test_a_killed_rank_without_restarts_is_named_on_all_hosts(nodes: list[Node], tmp_path: Path) -> None:
    job = Job(nodes, tmp_path / "job", run_dir=tmp_path / "run")
    job.until_step(10)
    job.containers[1].kill_ranks()
    codes = job.ends()
    assert codes[1] == 137 and codes[0] != 0, job.said()
    assert all("algo-2: a rank was ended by SIGKILL" in (c.failure() or "") for c in job.containers), job.said()


def test_a_lost_host_ends_the_job_soon_with_its_checkpoints_whole(
    nodes: list[Node], tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    run_dir = tmp_path / "run"
    job = Job(nodes, tmp_path / "first", run_dir=run_dir)
    job.until_step(45)
    # All processes go and the kernel closes their connections; one that falls silent is in tests/launch/test_node.py.
    job.containers[1].signal(signal.SIGKILL)
    # Waited for far less than the half hour that ranks would wait for each other.
    assert job.containers[0].wait() != 0, job.said()
    assert "node 1 (algo-2) is lost" in job.containers[0].log()
    verify = [sys.executable, "-m", "hypershard.cli.main", "checkpoint", "verify", str(run_dir)]
    checked = subprocess.run(verify, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert checked.returncode == 0 and "valid" in checked.stdout, checked.stdout + checked.stderr
    job = Job(nodes, tmp_path / "second", run_dir=run_dir)
    assert job.ends() == [0, 0], job.said()
    assert history(run_dir) == undisturbed
