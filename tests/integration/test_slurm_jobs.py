"""The job files of slurm/ on a real Slurm of two nodes: whatever ends a launch, the losses are those of a whole run."""

from __future__ import annotations

import os
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import SMALL, environment, history, steps
from tests.slurm_cluster import Slurm, slurm, slurm_available

from hypershard.launch.verdict import read_events

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "slurm" / "tiny_llama.sbatch"
FLAGS = {**SMALL, "model": None, "bf16": None, "max_steps": 40}
WAIT_SECONDS = 120.0
SLOW = 6_000_000  # bytes per second that a node sends: nearly a second a step, and no work for the processors
FAST = 1_000_000_000


class Cluster:
    """The cluster with a folder of the test's own."""

    def __init__(self, made: Slurm, folder: Path):
        self.slurm = made
        self.run_dir = folder / "run"
        self._folder = folder

    def submit(self, *options: str, variables: dict[str, str] | None = None, **flags: Any) -> str:
        """Submit slurm/tiny_llama.sbatch with the small run's flags, changed by `flags`; the job's number."""
        settings = {**FLAGS, **flags}
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        return self.slurm.submit(
            f"--chdir={self._folder}",
            *options,
            str(TINY),
            *words,
            variables={
                **environment(),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "RUN_DIR": str(self.run_dir),
                **(variables or {}),
            },
        )

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.out")))

    def finish(self, job: str) -> dict[str, str]:
        """Wait until the job has ended and will not come back."""
        try:
            return self.slurm.wait(job, "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL", seconds=WAIT_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def wait_for_step(self, step: int, job: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not any(record["step"] >= step for record in steps(self.run_dir)):
            assert self.slurm.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def wait_for_log(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self.log():
            assert time.monotonic() < deadline, f"never said {text!r}:\n{self.log()}"
            time.sleep(0.1)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run_dir / "events.jsonl") if event["event"] == kind]

    def set_speed(self, bytes_per_second: int) -> None:
        for node in self.slurm.nodes.values():
            node.slow_down(bytes_per_second)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := slurm_available():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(made: Slurm, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(made, tmp_path)
    made.empty()
    for node in made.nodes.values():
        node.slow_down(FAST)


@pytest.fixture(scope="module")
def undisturbed(made: Slurm, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The history of a job that nothing happens to."""
    cluster = Cluster(made, tmp_path_factory.mktemp("undisturbed"))
    job = cluster.finish(cluster.submit())
    assert job["JobState"] == "COMPLETED", cluster.log()
    assert "2 x CPU" in cluster.log(), "one rank on each node"
    assert "done: all steps are done" in cluster.log()
    assert (cluster.run_dir / "submit.sh").read_text() == TINY.read_text()
    assert len(steps(cluster.run_dir)) == FLAGS["max_steps"]
    return history(cluster.run_dir)


def test_a_time_limit_saves_and_the_requeued_job_goes_on(cluster: Cluster, undisturbed: list[tuple[Any, ...]]) -> None:
    cluster.set_speed(SLOW // 2)
    # The signal is due as soon as the limit is lowered; Slurm looks every 30 s.
    job = cluster.submit("--time=30", "--signal=B:USR1@119", variables={"SAVE_SECONDS": "30"})
    cluster.wait_for_step(2, job)
    cluster.slurm.run("scontrol", "update", f"jobid={job}", "timelimit=2")
    cluster.wait_for_log("the time is nearly over")
    cluster.slurm.run("scontrol", "update", f"jobid={job}", "timelimit=30")  # or the next start has as little
    cluster.set_speed(FAST)
    cluster.wait_for_log("restart 1")
    ended = cluster.finish(job)
    log = cluster.log()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "restart 0" in log, "the second start must append to the first one's log"
    stopped = cluster.events("stopped")[0]
    assert stopped["reason"] == "SIGTERM"
    assert [event["step"] for event in cluster.events("started")] == [0, stopped["step"]]
    assert history(cluster.run_dir) == undisturbed


def test_a_lost_node_requeues_the_job(cluster: Cluster, undisturbed: list[tuple[Any, ...]]) -> None:
    cluster.set_speed(SLOW)
    job = cluster.submit()
    cluster.wait_for_step(5, job)
    lost = cluster.slurm.names[1]
    cluster.slurm.lose(lost)
    cluster.slurm.wait(job, "PENDING")
    cluster.slurm.bring_back(lost)
    cluster.set_speed(FAST)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.log()
    assert cluster.events("started")[1]["step"] > 0
    assert history(cluster.run_dir) == undisturbed


def test_a_user_s_stop_saves_and_is_not_undone(cluster: Cluster, undisturbed: list[tuple[Any, ...]]) -> None:
    cluster.set_speed(SLOW)
    job = cluster.submit()
    cluster.wait_for_step(3, job)
    cluster.slurm.run("scancel", "--batch", "--signal=TERM", job)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "143:0", "0"), cluster.log()
    # Another job in the same folder goes on with the run.
    job = cluster.submit()
    cluster.wait_for_step(8, job)
    cluster.set_speed(FAST)
    cluster.slurm.run("scancel", job)
    cluster.slurm.wait_until_idle()
    ended = cluster.slurm.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.log()
    first, second = cluster.events("stopped")
    assert (first["reason"], second["reason"]) == ("SIGTERM", "SIGTERM")
    assert cluster.events("started")[1]["step"] == first["step"]
    assert history(cluster.run_dir) == undisturbed[: second["step"]]


def test_a_preempted_job_comes_back(cluster: Cluster, undisturbed: list[tuple[Any, ...]]) -> None:
    cluster.set_speed(SLOW)
    job = cluster.submit("--partition=low")
    cluster.wait_for_step(3, job)
    cluster.set_speed(FAST)
    urgent = cluster.slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert cluster.slurm.wait(urgent, "COMPLETED FAILED")["JobState"] == "COMPLETED"
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.log()
    assert cluster.events("stopped")[0]["reason"] == "SIGTERM"
    assert cluster.events("preempted")
    assert history(cluster.run_dir) == undisturbed


def test_a_crash_is_followed_by_a_look_at_the_nodes_and_another_launch(
    cluster: Cluster, undisturbed: list[tuple[Any, ...]]
) -> None:
    cluster.set_speed(SLOW)
    job = cluster.submit(variables={"HEALTH_CHECK": "1"})
    cluster.wait_for_step(6, job)
    name, node = list(cluster.slurm.nodes.items())[1]
    rank = [pid for pid, words in node.processes().items() if words[1:4] == ["-u", "-m", "hypershard.cli.main"]]
    os.kill(rank[0], 9)
    cluster.set_speed(FAST)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.log()
    assert f'"host": "{name}"' in (cluster.run_dir / "health.jsonl").read_text()
    assert len(cluster.events("launched")) == 2
    assert history(cluster.run_dir) == undisturbed


def test_a_job_that_cannot_start_is_given_up(cluster: Cluster) -> None:
    """An agent dies and leaves no error on record, the other would wait for it: neither hangs or repeats for ever."""
    job = cluster.submit("--export=ALL,MAX_RESTARTS=2,RANKS_PER_NODE=0,SAVE_SECONDS=3")
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), cluster.log()
    assert len(cluster.events("launched")) == 2
    assert "give_up: 2 launches without a newer step than 0" in cluster.log()


def test_wrong_flags_end_a_job_before_anything_is_launched(cluster: Cluster) -> None:
    assert cluster.finish(cluster.submit(hidden_widht=64))["ExitCode"] == "2:0", cluster.log()
    assert "did you mean --hidden_width?" in cluster.log()
    assert not cluster.events("launched")


def test_a_python_without_hypershard_is_named(cluster: Cluster, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty")
    job = cluster.submit(variables={"VENV": str(tmp_path / "empty"), "PYTHONPATH": ""})
    assert cluster.finish(job)["ExitCode"] == "2:0", cluster.log()
    assert "is VENV or IMAGE what it should be?" in cluster.log()


def test_a_container_is_asked_for_where_an_image_is_given(cluster: Cluster) -> None:
    """This Slurm has no Pyxis, and says so."""
    job = cluster.finish(cluster.submit(variables={"IMAGE": "/images/it.sqsh"}))
    assert job["ExitCode"] == "2:0", cluster.log()
    assert "unrecognized option '--container-image=/images/it.sqsh'" in cluster.log()


def test_auto_resume_is_asked_for_on_hyperpod(cluster: Cluster) -> None:
    """This Slurm is not HyperPod's, and says so. The first node alone has what HyperPod is known by."""
    first = cluster.slurm.nodes[cluster.slurm.names[0]]
    layers = "lowerdir=/opt,upperdir=/dev/shm/upper,workdir=/dev/shm/work"
    first.run(["mkdir", "/dev/shm/upper", "/dev/shm/work", "/dev/shm/upper/sagemaker_cluster"])
    first.run(["mount", "-t", "overlay", "overlay", "-o", layers, "/opt"])
    job = cluster.finish(cluster.submit(variables={"MAX_RESTARTS": "1"}))
    first.run(["umount", "/opt"])
    assert job["JobState"] == "FAILED", cluster.log()
    assert "unrecognized option '--auto-resume=1'" in cluster.log()


def test_the_command_submits(cluster: Cluster) -> None:
    words = [sys.executable, "-m", "hypershard.cli.main", "launch", "slurm", "--model=tiny_llama"]
    refused = cluster.slurm.run(*words, "--partition=nowhere", check=False)
    assert refused.returncode == 1
    assert "sbatch refused the job" in refused.stderr
    assert "partition" in refused.stderr
    taken = cluster.slurm.run(*words, "--partition=high", "--nodes=1", f"--run_dir={cluster.run_dir}", "--max_steps=1")
    job = cluster.slurm.job(taken.stdout.split()[-1])
    assert (job["JobName"], job["NumNodes"][0], job["Partition"]) == ("tiny-llama-cpu-x1", "1", "high"), job


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_the_scheduler_takes_every_file(made: Slurm, path: Path) -> None:
    done = made.run("sbatch", "--test-only", "--partition=gpus", str(path), check=False)
    assert done.returncode == 0, done.stderr
    done = made.run("sbatch", "--test-only", "--partition=gpus", "--nodes=17", str(path), check=False)
    assert done.returncode != 0, "there are 16 such nodes"
