"""What the planner says of a profile's step: the `Estimate` that a time window asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...units import format_bytes
from ..calibration.calibration import Calibration, calibrated, installed_software
from ..estimate import Memory, check_job, find_remedy, memory_of
from ..job import Job
from ..overheads import Overheads, overheads
from ..steps import StepTime, step_time
from .fit import Estimate, StepCost
from .profiles import Profile


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A job's step, its seconds (of a measured speed where one is given), and what comes beside the steps."""

    step: StepTime
    step_seconds: float
    beside: Overheads


def timed(job: Job, *, tokens_per_second_per_gpu: float | None, calibrations: Sequence[Calibration]) -> Timed:
    """The job's time; the two as for `plan`. Raises ConfigError where it is unknown, and as `check_job` does."""
    check_job(job)
    step = calibrated(step_time(job), job, calibrations, software=installed_software())
    speed = tokens_per_second_per_gpu
    seconds = step.seconds if speed is None else job.step_tokens / job.num_gpus / speed
    return Timed(step=step, step_seconds=seconds, beside=overheads(job, step_seconds=seconds))


def planner_estimate(
    job_of: Callable[[Profile], Job], *, tokens_per_second_per_gpu: float | None, calibrations: Sequence[Calibration]
) -> Estimate:
    """An estimate that plans the job with a profile's settings, which `job_of` makes.

    `tokens_per_second_per_gpu` and `calibrations`: as for `plan`. The estimate raises ConfigError where the time is
    unknown, or settings do not go together.
    """

    def estimate(profile: Profile) -> StepCost:
        job = job_of(profile)
        time = timed(job, tokens_per_second_per_gpu=tokens_per_second_per_gpu, calibrations=calibrations)
        found = memory_of(job)
        # A plan that is tight is optimistic about time, so it is taken only where no smaller micro-batch is left.
        fits = found.verdict == "fits" or (found.verdict == "tight" and profile.train_batch_size == 1)
        return StepCost(
            step_seconds=time.step_seconds + time.beside.each_step_seconds,
            overhead_seconds=time.beside.once_seconds,
            band=time.step.band,
            num_gpus=job.num_gpus,
            fits_in_memory=fits,
            memory_verdict=_verdict(job, found, is_last=profile.train_batch_size == 1),
        )

    return estimate


def _verdict(job: Job, found: Memory, *, is_last: bool) -> str:
    """In words; with what would make it fit, where no smaller micro-batch is left to try."""
    fit = found.gpu if found.gpu.verdict == found.verdict else found.host
    text = f"{found.verdict}: {format_bytes(fit.needed_bytes)} of {format_bytes(fit.usable_bytes)} ({fit.of})"
    if not is_last or found.verdict != "does not fit":
        return text
    return f"{text}; {find_remedy(job)}"
