"""What a step leaves in metrics.jsonl, and the clock that counts a run's seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.memory import peak_memory_bytes
from ..metrics.on_track import Pace
from ..metrics.throughput import throughput
from .setup import Job
from .state import Progress, StepReport


class Stopwatch:
    """Seconds since it was last read, so that no second of a run is counted twice or not at all."""

    def __init__(self) -> None:
        self._read_at = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._read_at = now - self._read_at, now
        return elapsed


def ledger_cursors(facts: Mapping[str, Any], due: Sequence[str]) -> str | None:
    """Cursors of streams for the run's record, from which `hypershard data ledger` reads on; None for memory saves,
    which come too often to be kept."""
    return None if set(due) <= {"memory"} else facts["cursors"]


def step_record(job: Job, progress: Progress, report: StepReport, pace: Pace) -> dict[str, Any]:
    """The numbers of the step that led to `progress`; their meanings stand in metrics/README.md."""
    last_step = job.last_step(progress)
    speed = throughput(
        tokens=report.tokens,
        seconds=report.seconds,
        flops_per_token=job.flops_per_token,
        num_gpus=job.world.size,
        peak_flops_per_gpu=job.peak_flops_per_gpu,
    )
    return {
        "loss": report.loss,
        **report.statistics,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": progress.tokens,
        "step_seconds": report.seconds,
        "data_seconds": report.data_seconds,
        "padding": report.padding,
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "memory_bytes": peak_memory_bytes(job.world.device),
        "skipped": report.skipped,
        "last_step": last_step,
        **pace.on_track(elapsed_seconds=progress.seconds, step=progress.step, last_step=last_step).metrics(),
    }
