"""Where the training stands, and the tensors that hold it: everything a checkpoint must contain, nothing more.

Random numbers need no entry: every step seeds its generators from (seed, step, rank), so a resumed step
draws what an uninterrupted one would, and a run on another number of ranks has numbers of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..optim.adamw import MOMENTS


@dataclass(frozen=True)
class Course:
    """A schedule that was laid anew so that the run ends within its window (replan.py): its end, and its two shares."""

    max_seconds: float
    last_step: int
    warmup: float
    plateau: float


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far (nats per token, or per pair of answers), after which step, and how many since
    were no lower."""

    loss: float
    step: int
    num_since: int = 0


@dataclass(frozen=True)
class Progress:
    """Counters of the run over all its restarts. `samples` is the position in the data's global order.

    `course` None: the schedule is as configured. `validation_loss`, `best` None: nothing was validated yet.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_steps: int = 0
    skipped_in_row: int = 0
    course: Course | None = None
    validation_loss: float | None = None
    best: Best | None = None

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else self.best.step


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reason: str
    progress: Progress


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; the same on every rank but for `seconds` and what is counted of data.

    data_seconds: how long this rank waited for its batches; padding: share of its inputs that only fill up rows.

    loss in nats per token (per pair of answers) over the global batch, `statistics` the means beside it by name;
    grad_norm before clipping; `skipped` when either was not finite and the weights were left alone; `flags` says of
    each flag given to the step whether any rank raised it.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    samples: int
    seconds: float
    data_seconds: float
    padding: float
    skipped: bool
    statistics: Mapping[str, float]
    flags: tuple[bool, ...]


def advance(progress: Progress, report: StepReport, *, seconds: float) -> Progress:
    """The state after a step that took `seconds` of the run, saves and validations before it included."""
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        samples=progress.samples + report.samples,
        tokens=progress.tokens + report.tokens,
        seconds=progress.seconds + seconds,
        optimizer_steps=progress.optimizer_steps + (not report.skipped),
        skipped_in_row=progress.skipped_in_row + 1 if report.skipped else 0,
    )


def judged(progress: Progress, loss: float, *, min_gain: float) -> Progress:
    """`progress` after a validation; its `loss` is the best if lower than that before by the share `min_gain`."""
    best = progress.best
    if best is None or loss < best.loss * (1 - min_gain):
        best = Best(loss, progress.step)
    else:
        best = dataclasses.replace(best, num_since=best.num_since + 1)
    return dataclasses.replace(progress, validation_loss=loss, best=best)


def checkpoint_tensors(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Weights and moments by name; loading into them in place restores the training."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in MOMENTS if parameter in optimizer.state else ():
            tensors[f"optimizer/{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def progress_from(facts: Mapping[str, object]) -> Progress:
    """The counters in a checkpoint's facts."""
    values: dict[str, Any] = {field.name: facts[field.name] for field in dataclasses.fields(Progress)}
    course, best = values["course"], values["best"]
    values["course"] = None if course is None else Course(**course)
    values["best"] = None if best is None else Best(**best)
    return Progress(**values)


def seed_everything(seed: int, *, step: int, rank: int) -> None:
    """Make all random numbers of a step a function of (seed, step, rank): torch on every device, numpy, Python."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
