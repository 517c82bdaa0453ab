"""The supervisor of a node: exit codes, signals, orphans, restarts. Each runs in a process of its own, as it will."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.integration.processes import SMALL, WAIT_SECONDS, environment, is_gone
from tests.nodes import nodes_available

from hypershard.cli.launch import run as launch
from hypershard.errors import ConfigError

START = [sys.executable, "-m", "hypershard.launch.start"]
reason = nodes_available()
needs_nodes = pytest.mark.skipif(reason is not None, reason=reason or "")

# A supervisor of any program: what follows says what it runs and where it believes to be.
SUPERVISE = """
import json, sys
from pathlib import Path
from hypershard.launch.node import Supervisor
from hypershard.launch.surroundings import NodePlace, Platform
platform, command = sys.argv[1], sys.argv[2:]
ending = Supervisor(command, {"PATH": "/usr/bin:/bin"}, NodePlace(platform=Platform(platform))).run(start_seconds=5)
print(json.dumps([ending.code, ending.error]), flush=True)
"""


def supervise(
    command: Sequence[str], *, platform: str = "alone", before: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    words = [*before, sys.executable, "-c", SUPERVISE, platform, *command]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | {"SECRET_TOKEN": "s" * 20}
    )


def ending(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, errors
    code, error = json.loads(said.splitlines()[-1])
    return code, error


def test_the_exit_code_and_the_error_are_kept() -> None:
    assert ending(supervise(["true"])) == (0, "")
    words = ["sh", "-c", f"echo '12:00:00 E out of memory, key {'s' * 20}' >&2; exit 7"]
    assert ending(supervise(words)) == (7, "127.0.0.1: exit code 7\nout of memory, key [redacted]")
    code, error = ending(supervise(["sh", "-c", "kill -KILL $$"]))
    assert code == 137 and "ended by SIGKILL" in error


@pytest.mark.parametrize(("platform", "code"), [("alone", 0), ("SageMaker", 0), ("Kubernetes", 143), ("Slurm", 143)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_clean_stop_is_told_as_the_platform_reads_it(platform: str, code: int, number: signal.Signals) -> None:
    words = ["sh", "-c", f"trap 'echo saved; exit 0' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"]
    process = supervise(words, platform=platform)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    assert said.splitlines() == ["saved", json.dumps([code, ""])]


def test_a_failed_save_is_no_clean_stop() -> None:
    process = supervise(["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"])
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    assert ending(process)[0] == 5


def test_a_wish_for_a_save_ends_nothing() -> None:
    words = [
        "sh",
        "-c",
        "trap 'echo saved; asked=1' USR2; echo ready; while [ -z $asked ]; do sleep 0.05; done; exit 0",
    ]
    process = supervise(words)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=WAIT_SECONDS)[0].splitlines() == ["saved", '[0, ""]']


def test_the_program_ends_with_its_supervisor(tmp_path: Path) -> None:
    process = supervise(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"])
    deadline = time.monotonic() + WAIT_SECONDS
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert is_gone(int((tmp_path / "pid").read_text()))


@needs_nodes
def test_process_1_collects_orphans_and_ends_by_a_signal() -> None:
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    # Ten children whose parent ends at once; then how many of the container's processes are zombies.
    script = """
        for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 0.1 &); done
        sleep 1; grep -q Supervisor /proc/1/cmdline && echo pid 1: supervisor
        echo zombies: $(cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ')
        trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"""
    process = supervise(["sh", "-c", script], before=apart)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(3)]
    assert said == ["pid 1: supervisor", "zombies: 0", "ready"]
    unshare = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(unshare[0]), signal.SIGTERM)
    assert ending(process) == (0, "")


def start(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*START, *words], capture_output=True, text=True, env=environment(), cwd=cwd, timeout=WAIT_SECONDS, check=False
    )


def test_other_verbs_and_help_run_once(tmp_path: Path) -> None:
    done = start("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip()
    done = start("train", "--show_config", "--model=tiny_llama", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("vocab_size ") == 1
    done = start("report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere" in done.stderr


def test_a_wrong_number_is_refused(tmp_path: Path) -> None:
    done = start("train", "--nproc_per_node=many", cwd=tmp_path)
    assert done.returncode == 2 and "--nproc_per_node: found 'many', expected a whole number" in done.stderr


def flags(**changes: object) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, **changes}.items()]


@pytest.mark.slow
def test_a_users_error_is_not_tried_again(tmp_path: Path) -> None:
    done = start("train", *flags(dataset="nothing.jsonl"), "--max_restarts", "5", "--run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("--dataset=nothing.jsonl: found nothing there"), done.stderr
    assert done.stderr.count("failed (exitcode: 2)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks_first", [False, True])
def test_a_stop_before_anything_was_trained_is_clean(tmp_path: Path, ranks_first: bool) -> None:
    words = [*START, "train", *flags(), "--nproc_per_node=2", "--run_dir=run"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
    assert process.stderr is not None
    while "torch.distributed.run" not in process.stderr.readline():
        pass
    if ranks_first:
        deadline = time.monotonic() + WAIT_SECONDS
        while not any(children(pid) for pid in children(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=WAIT_SECONDS) == 0, process.stderr.read()
    assert not list(tmp_path.iterdir())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_launch_local_trains(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hypershard.cli.main", "launch", "local", f"--run_dir={tmp_path}/run"]
    words += ["--nproc_per_node=2", *flags(max_steps=3)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "done after step 3 (steps)" in done.stderr and "2 x CPU" in done.stderr


def test_launch_local_prints_what_it_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["local", "--model=tiny_llama", "--run_dir=run", "--nproc_per_node=2", "--dry_run", "--lr=3e-4"]) == 0
    said = capsys.readouterr().out
    assert "export NCCL_DEBUG=WARN  # " in said
    assert "--nnodes=1 --nproc_per_node=2 --max_restarts=0" in said and "--lr=3e-4 --run_dir=run" in said
    with pytest.raises(ConfigError, match="learning_rat"):
        launch(["local", "--model=tiny_llama", "--run_dir=run", "--dry_run", "--learning_rat=1"])


def test_the_launcher_script_is_the_verb(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launchers" / "local.py"
    words = [sys.executable, str(script), "--model=tiny_llama", "--run_dir=run", "--dry_run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0 and "torch.distributed.run" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing"
