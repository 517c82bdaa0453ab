"""The page: what a training run does, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..checkpoint.policy import is_due
from ..distributed.collectives import from_main
from ..metrics.on_track import Pace
from ..metrics.sinks import Sink, close
from . import guard
from .evaluate import evaluate
from .records import Stopwatch, ledger_cursors, step_record
from .rehearse import rehearse
from .replan import first_course, lay_course
from .restore import Start, restore
from .setup import Job
from .state import Outcome, Progress, advance, judged
from .step import train_step
from .stop import SaveWish, StopSignals, stop_reason
from .texts import WrittenText, write_texts

KeepTexts = Callable[[int, Sequence[WrittenText]], None]


@dataclass(frozen=True)
class Schedule:
    """When things happen: steps between logs and validations (None: only at the end), minutes between saves."""

    logging: int
    validation: int | None
    save_minutes: float | None


def run(
    job: Job,
    start: Start,
    schedule: Schedule,
    *,
    eval_only: bool,
    open_sinks: Callable[[int, int], Sequence[Sink]],
    keep_texts: KeepTexts,
    event: Callable[..., None],
) -> Outcome:
    """Train until something says stop; every rank returns the same outcome (but for its own seconds)."""

    progress = restore(job, start)
    sinks, pace = open_sinks(progress.step, job.last_step(progress)), Pace(job.forecast)
    event("started", step=progress.step, world_size=job.world.size, **job.data_position(progress))
    if eval_only:
        progress = validate(job, progress, sinks, keep_texts)
        close(sinks)
        return Outcome("eval_only", progress)
    rehearse(job)
    progress = first_course(job, progress)
    job.checkpoints.begin(progress.step, job.tensors(), job.facts(progress))
    stopwatch, wish = Stopwatch(), SaveWish(schedule.save_minutes, now=time.monotonic())
    with StopSignals(wish) as signals:

        def wanted() -> str | None:
            return signals.received or job.limits.time_over(progress, time.time(), job.checkpoints.reserve_seconds)

        def flags() -> list[float]:
            save = job.world.ranks.is_main and wish.is_wanted(time.monotonic())
            return [float(wanted() is not None), float(save), *job.checkpoints.flags()]

        while (reason := stop_reason(progress, job.limits, asked=signals.agreed)) is None:
            report = train_step(job, progress, flags=flags)
            progress = advance(progress, report, seconds=stopwatch.lap())
            guard.check(report, progress, max_skipped_steps=job.optim.max_skipped_steps)
            if pace.add(report.seconds):
                progress = lay_course(job, progress, step_seconds=pace.step_seconds())
            last_step = job.last_step(progress)
            stop_asked, save_asked, *busy = report.flags
            if stop_asked:
                signals.agreed = from_main(wanted()) or "another rank's signal"
            if is_due(progress.step, schedule.logging, last_step):
                for sink in sinks:
                    sink.write(progress.step, step_record(job, progress, report, pace))
            # Before the save: a run that goes on from it finds all that belongs to its steps written.
            if is_due(progress.step, schedule.validation, last_step):
                progress = validate(job, progress, sinks, keep_texts)
            due = job.checkpoints.due(
                progress.step, busy, asked=save_asked, best_step=progress.best_step, step_seconds=report.seconds
            )
            if due:
                job.checkpoints.save(progress.step, job.tensors(), facts := job.facts(progress), due=due)
                wish.granted(due, time.monotonic())
                stall_seconds, cursors = job.checkpoints.last_stall_seconds, ledger_cursors(facts, due)
                event("saved", step=progress.step, tiers=due, stall_seconds=stall_seconds, cursors=cursors)
            job.checkpoints.poll()
        if job.checkpoints.save_last(progress.step, job.tensors(), job.facts(progress)):
            event("saved", step=progress.step, tiers=["all"], stall_seconds=job.checkpoints.last_stall_seconds)
    job.checkpoints.close(is_complete=reason in ("steps", "early"))
    event("stopped", step=progress.step, reason=reason)
    close(sinks)
    return Outcome(reason, progress)


def validate(job: Job, progress: Progress, sinks: Sequence[Sink], keep_texts: KeepTexts) -> Progress:
    """`progress` judged by its loss, which `sinks` are told with what stands beside it; and what the model writes."""
    found = evaluate(job)
    for sink in sinks:
        sink.write(progress.step, {**found, "tokens": progress.tokens})
    keep_texts(progress.step, write_texts(job))
    return judged(progress, found["validation_loss"], min_gain=job.limits.min_gain)
