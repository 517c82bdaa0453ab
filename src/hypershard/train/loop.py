"""The page: what a training run does, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.policy import is_due
from ..distributed.collectives import from_main
from ..log import logger
from ..metrics.memory import peak_memory_bytes
from ..metrics.sinks import Sink
from ..metrics.throughput import throughput
from . import guard
from .evaluate import evaluate
from .rehearse import rehearse
from .restore import restore
from .setup import Job
from .state import Progress, StepReport, advance
from .step import train_step
from .stop import StopSignals, stop_reason


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; None: only at the end. `saves` False: no checkpoint is ever written."""

    logging: int
    validation: int | None
    save: int | None
    saves: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reason: str
    progress: Progress
    validation_loss: float | None


def run(
    job: Job,
    schedule: Schedule,
    *,
    resume: bool,
    resume_from: Path | None,
    resume_required: bool,
    eval_only: bool,
    open_sinks: Callable[[int], Sequence[Sink]],
    event: Callable[..., None],
) -> Outcome:
    """Train until something says stop; every rank returns the same outcome (but for its own seconds)."""
    progress = restore(job, source=resume_from, required=resume_required) if resume else Progress()
    sinks = open_sinks(progress.step)
    event("started", step=progress.step, world_size=job.world.size)
    if eval_only:
        return Outcome("eval_only", progress, _validate(job, progress, sinks))
    rehearse(job)
    if schedule.saves:
        job.checkpoints.begin(progress.step, job.tensors)
    else:
        logger.warning("--checkpoint_freq=0: nothing will be saved, and a stop loses the run")
    saved_step, validation_loss = progress.step, None
    asked: str | None = None
    since = Stopwatch()
    with StopSignals() as signals:
        while (reason := stop_reason(progress, job.limits, asked=asked)) is None:
            wanted = signals.received or _hours_are_over(job, progress)
            report = train_step(job, progress, stop_wanted=wanted is not None)
            progress = advance(progress, report, seconds=since.restart())
            guard.check(report, progress, max_skipped_steps=job.optim.max_skipped_steps)
            if report.stop_asked:
                asked = from_main(wanted) or "a signal to another rank"
            if is_due(progress.step, schedule.logging, job.limits.last_step):
                _write(job, progress, report, sinks)
            if schedule.saves and is_due(progress.step, schedule.save, job.limits.last_step):
                _save(job, progress, event)
                saved_step = progress.step
            job.checkpoints.poll()
            if is_due(progress.step, schedule.validation, job.limits.last_step):
                validation_loss = _validate(job, progress, sinks)
        if schedule.saves and saved_step != progress.step:
            _save(job, progress, event)
        job.checkpoints.finish()
        event("stopped", step=progress.step, reason=reason)
        for sink in sinks:
            sink.close()
    return Outcome(reason, progress, validation_loss)


class Stopwatch:
    """Seconds since it was last read: what a step took with the saves and validations before it."""

    def __init__(self) -> None:
        self._read_at = time.perf_counter()

    def restart(self) -> float:
        now = time.perf_counter()
        elapsed, self._read_at = now - self._read_at, now
        return elapsed


def _hours_are_over(job: Job, progress: Progress) -> str | None:
    limit = job.limits.max_seconds
    return "hours" if limit is not None and progress.seconds >= limit else None


def _save(job: Job, progress: Progress, event: Callable[..., None]) -> None:
    job.checkpoints.save(progress.step, job.tensors, job.facts(progress))
    event("saved", step=progress.step, stall_seconds=job.checkpoints.last_stall_seconds)


def _validate(job: Job, progress: Progress, sinks: Sequence[Sink]) -> float:
    loss = evaluate(job)
    for sink in sinks:
        sink.write(progress.step, {"validation_loss": loss, "tokens": progress.tokens})
    return loss


def _write(job: Job, progress: Progress, report: StepReport, sinks: Sequence[Sink]) -> None:
    speed = throughput(
        tokens=report.tokens,
        seconds=report.seconds,
        flops_per_token=job.flops_per_token,
        num_gpus=job.world.size,
        peak_flops_per_gpu=job.peak_flops_per_gpu,
    )
    record: dict[str, Any] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": progress.tokens,
        "step_seconds": report.seconds,
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "memory_bytes": peak_memory_bytes(job.world.device),
        "skipped": report.skipped,
    }
    for sink in sinks:
        sink.write(progress.step, record)
