"""The page: what a training run does, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..checkpoint.policy import is_due
from ..distributed.collectives import from_main
from ..log import logger
from ..metrics.sinks import Sink, close
from . import guard
from .evaluate import evaluate
from .records import Stopwatch, step_record
from .rehearse import rehearse
from .restore import Start, restore
from .setup import Job
from .state import Progress, advance
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
    start: Start,
    schedule: Schedule,
    *,
    eval_only: bool,
    open_sinks: Callable[[int], Sequence[Sink]],
    event: Callable[..., None],
) -> Outcome:
    """Train until something says stop; every rank returns the same outcome (but for its own seconds)."""

    def save() -> None:
        job.checkpoints.save(progress.step, job.tensors(), job.facts(progress))
        event("saved", step=progress.step, stall_seconds=job.checkpoints.last_stall_seconds)

    def validate() -> float:
        loss = evaluate(job)
        for sink in sinks:
            sink.write(progress.step, {"validation_loss": loss, "tokens": progress.tokens})
        return loss

    progress = restore(job, start)
    sinks = open_sinks(progress.step)
    event("started", step=progress.step, world_size=job.world.size)
    if eval_only:
        outcome = Outcome("eval_only", progress, validate())
        close(sinks)
        return outcome
    rehearse(job)
    if schedule.saves:
        job.checkpoints.begin(progress.step, job.tensors())
    else:
        logger.warning("--checkpoint_freq=0: nothing will be saved, and a stop loses the run")
    last_step, saved_step, validation_loss = job.limits.last_step, progress.step, None
    asked: str | None = None
    stopwatch = Stopwatch()
    with StopSignals() as signals:
        while (reason := stop_reason(progress, job.limits, asked=asked)) is None:
            wanted = signals.received or job.limits.hours_over(progress)
            report = train_step(job, progress, stop_wanted=wanted is not None)
            progress = advance(progress, report, seconds=stopwatch.lap())
            guard.check(report, progress, max_skipped_steps=job.optim.max_skipped_steps)
            if report.stop_asked:
                asked = from_main(wanted) or "a signal to another rank"
            if is_due(progress.step, schedule.logging, last_step):
                for sink in sinks:
                    sink.write(progress.step, step_record(job, progress, report))
            if schedule.saves and is_due(progress.step, schedule.save, last_step):
                save()
                saved_step = progress.step
            job.checkpoints.poll()
            if is_due(progress.step, schedule.validation, last_step):
                validation_loss = validate()
        if schedule.saves and saved_step != progress.step:
            save()
        job.checkpoints.finish()
    event("stopped", step=progress.step, reason=reason)
    close(sinks)
    return Outcome(reason, progress, validation_loss)
