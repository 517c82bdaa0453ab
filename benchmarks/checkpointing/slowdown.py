"""What the memory tier costs a training: the same job trains with it off, every 10 steps and every step, in turn."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from hypershard.train.setup import Job
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

from .case import Bench, Case

OFF = "off"
FREQUENCIES = (10, 1)


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Total seconds of each block of steps by name of the setting, and the longest stalls within it."""
    folder = Path(case.folder)
    job = bench.build(case, case.train_scale, folder / "off")
    # A tier that keeps checkpoints for good is on, but saves only when asked: so the memory is given back at the end.
    settings = {
        f"every {every}": {"in_memory_checkpointing_freq": every, "checkpoint_freq": None} for every in FREQUENCIES
    }
    jobs = {OFF: job}
    for name, changes in settings.items():
        manager = bench.manager(job, folder / name.replace(" ", "-"), **changes)
        jobs[name] = dataclasses.replace(job, checkpoints=manager)
    totals: dict[str, list[float]] = {name: [] for name in jobs}
    stalls: dict[str, list[float]] = {name: [] for name in jobs}
    progress = Progress()
    for number in range(case.train_rounds + 1):
        order = list(jobs) if number % 2 else list(jobs)[::-1]  # neither is always first
        for name in order:
            began_at = bench.start_line()
            progress, block_stalls = _train(jobs[name], progress, case.train_steps)
            total = bench.slowest([time.perf_counter() - began_at])[0]
            longest = bench.slowest([max(block_stalls, default=0.0)])[0]
            if number:  # the first round warms up
                totals[name].append(total)
                stalls[name].append(longest)
    for name in settings:
        jobs[name].checkpoints.close(is_complete=True)
    return {
        "scale": case.train_scale,
        "steps": case.train_steps,
        "state_bytes": bench.sum(sum(tensor.to_local().nbytes for tensor in job.tensors().values())),
        "seconds": totals,
        "longest_stall": stalls,
    }


def _train(job: Job, progress: Progress, num_steps: int) -> tuple[Progress, list[float]]:
    """As the training loop does it, with what is still being written at the end counted in; the stalls of its saves."""
    saves, stalls = job.checkpoints, []
    for _ in range(num_steps):
        report = train_step(job, progress, flags=saves.flags)
        progress = advance(progress, report, seconds=report.seconds)
        due = saves.due(progress.step, report.flags, asked=False, best_step=None, step_seconds=report.seconds)
        if due:
            saves.save(progress.step, job.tensors(), job.facts(progress), due=due)
            stalls.append(saves.last_stall_seconds)
        saves.poll()
    saves.finish()
    return progress, stalls
