"""Whole training processes, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hypershard.metrics.sinks import read_json_lines

WAIT_SECONDS = 180  # far more than any of these runs takes; a process still there then hangs

SMALL = {
    "model": "tiny_llama",
    "hidden_width": 64,
    "num_layers": 2,
    "intermediate_size": 128,
    "max_context_width": 64,
    "train_batch_size": 2,
    "max_steps": 14,
    "checkpoint_freq": 4,
    "validation_batches": 2,
    "bf16": 0,
    "tensorboard_dir": "none",
}


def command(**flags: Any) -> list[str]:
    """`hypershard train` with the small run's settings, changed by `flags` (None drops one)."""
    settings = {**SMALL, **flags}
    words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return [sys.executable, "-m", "hypershard.cli.main", "train", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything printed."""
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, output


def train(**flags: Any) -> tuple[int, str]:
    return finish(start(command(**flags)))


def train_well(**flags: Any) -> str:
    code, output = train(**flags)
    assert code == 0, output
    return output


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl."""
    return [record for record in read_json_lines(run_dir / "metrics.jsonl") if "loss" in record]


def history(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must not differ between an interrupted and an uninterrupted run: all but the times."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in steps(run_dir)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return as soon as `step` has been written."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in steps(run_dir)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never written")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that `hypershard train` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def is_gone(pid: int) -> bool:
    """Whether a process ends within a moment (a zombie that nobody has collected has ended)."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False
