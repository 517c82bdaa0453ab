"""The run's schedule laid over the steps that fit into --max_hours: by the plan, then again by what was measured."""

from __future__ import annotations

import dataclasses

from ..distributed.collectives import from_main
from ..log import logger
from ..optim.replan import replanned, reserve_hours
from .rehearse import measured_step_seconds
from .setup import Job
from .state import Course, Progress

_SMALLEST_CHANGE = 0.02  # of the steps still to come; less is the noise of measuring


def first_course(job: Job, progress: Progress) -> Progress:
    """`progress` with a course for --max_hours, before the first step of a process; collective.

    By the plan's seconds of a step, where it has none by one micro-step's. A run that goes on in the same window keeps
    its course; in another it is laid anew over the configured schedule, which without --max_hours stands as it is.
    """
    course = progress.course
    if course is not None and course.max_seconds == job.limits.max_seconds:
        return progress
    progress = dataclasses.replace(progress, course=None)
    if job.limits.max_seconds is None:
        return progress
    return lay_course(job, progress, step_seconds=job.forecast.step_seconds or measured_step_seconds(job))


def lay_course(job: Job, progress: Progress, *, step_seconds: float) -> Progress:
    """`progress` with a course that ends within --max_hours and its reserve, if there is such a window; collective.

    What rank 0 says of `step_seconds` counts, and its clock.
    """
    limits = job.limits
    if limits.max_seconds is None:
        return progress
    step_seconds = from_main(step_seconds)
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
    return dataclasses.replace(
        progress, course=Course(limits.max_seconds, anew.last_step, anew.optim.warmup, anew.optim.plateau)
    )
