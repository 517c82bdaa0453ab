"""The run's schedule laid over the steps that fit into --max_hours: by the plan, then again by what was measured."""

from __future__ import annotations

import dataclasses

from ..distributed.collectives import from_main
from ..log import logger
from ..optim.replan import replanned, reserve_hours
from .setup import Job
from .state import Course, Progress

_SMALLEST_CHANGE = 0.02  # of the steps still to come; less is the noise of measuring


def lay_course(job: Job, progress: Progress, *, step_seconds: float | None) -> Progress:
    """`progress` with a course that ends within --max_hours and its reserve; collective, alike on all ranks.

    `step_seconds`: as measured, None before any step: then the plan's, if it has one. Without --max_hours the schedule
    is the configured one.
    """
    limits = job.limits
    if limits.max_seconds is None:
        return dataclasses.replace(progress, course=None)
    step_seconds = from_main(step_seconds or job.forecast.step_seconds)
    if step_seconds is None:
        return progress
    course = progress.course
    last_step = job.last_step(progress)
    optim = job.optim
    if course is not None:
        optim = dataclasses.replace(optim, warmup=course.warmup, plateau=course.plateau)
    hours = limits.max_seconds / 3600
    left = (hours - reserve_hours(hours)) * 3600 - from_main(progress.seconds)
    anew = replanned(
        optim,
        step=progress.step,
        last_step=last_step,
        asked_steps=limits.last_step,
        step_seconds=step_seconds,
        seconds_left=left,
    )
    if abs(anew.fitting - last_step) <= _SMALLEST_CHANGE * (last_step - progress.step):
        return progress
    say = logger.info if anew.last_step == anew.fitting else logger.warning
    say(f"--max_hours={hours:g} at {step_seconds:.3g} s a step: {anew.why}")
    if anew.last_step == last_step:
        return progress
    return dataclasses.replace(progress, course=Course(anew.last_step, anew.optim.warmup, anew.optim.plateau))
