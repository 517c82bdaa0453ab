"""A training in a window of hours: how many steps fit, and the schedule laid over them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..config.schema import OptimConfig

_MOST_RESERVE_HOURS = 0.5
_RESERVE_SHARE = 0.05


def reserve_hours(max_hours: float) -> float:
    """Hours of a window that no plan spends, for what none foresees: queues, a slow download, one restart.

    Half an hour; of windows under ten hours a twentieth.
    """
    return min(_MOST_RESERVE_HOURS, _RESERVE_SHARE * max_hours)


def steps_that_fit(*, seconds: float, step_seconds: float) -> int:
    """Whole steps within `seconds`."""
    return max(0, math.floor(seconds / step_seconds))


@dataclass(frozen=True, kw_only=True)
class Replan:
    """The schedule from here on: the run ends at `last_step`, with `optim`, and `fitting` steps would fit; `why`."""

    fitting: int
    last_step: int
    optim: OptimConfig
    why: str


def replanned(
    optim: OptimConfig,
    *,
    step: int,
    last_step: int,
    asked_steps: int,
    step_seconds: float,
    seconds_left: float,
) -> Replan:
    """Lay the schedule over the steps that fit, now that a step's seconds were measured.

    After `step` of `last_step`, at most `asked_steps`, with `seconds_left` until the final save has to begin. Steps
    already done keep their rate: before the first one any style can be laid anew; later wsd can, which only moves the
    decay, as long as it has not begun, and constant, which has none. Any other style is then left as it is.
    """
    fitting = max(step + 1, min(asked_steps, step + steps_that_fit(seconds=seconds_left, step_seconds=step_seconds)))
    if fitting == last_step:
        return Replan(fitting=fitting, last_step=last_step, optim=optim, why="the steps planned are those that fit")
    if optim.lr_decay_style == "constant" or step == 0:
        return Replan(
            fitting=fitting, last_step=fitting, optim=optim, why=f"{fitting:,} steps fit, {last_step:,} were planned"
        )
    if optim.lr_decay_style != "wsd" or optim.lr_decay_iters is not None:
        why = f"{fitting:,} steps fit, but the schedule of {last_step:,} has begun; only --lr_decay_style=wsd without "
        return Replan(fitting=fitting, last_step=last_step, optim=optim, why=why + "--lr_decay_iters can be laid anew")
    warmup_steps = math.ceil(optim.warmup * last_step)
    decay_starts_at = warmup_steps + math.floor(optim.plateau * last_step)
    if step > decay_starts_at:
        why = f"{fitting:,} steps fit, but the decay began after step {decay_starts_at:,}"
        return Replan(fitting=fitting, last_step=last_step, optim=optim, why=why)
    held = min(max(math.floor(optim.plateau * fitting), step - warmup_steps), fitting - warmup_steps - 1)
    if held < 1:
        why = f"only {fitting:,} steps fit, no more than the warm-up; it stays as it is"
        return Replan(fitting=fitting, last_step=last_step, optim=optim, why=why)
    # Halves between two whole numbers: the shares give these very steps when the schedule rounds them.
    anew = dataclasses.replace(optim, warmup=max(0.0, (warmup_steps - 0.5) / fitting), plateau=(held + 0.5) / fitting)
    return Replan(
        fitting=fitting, last_step=fitting, optim=anew, why=f"{fitting:,} steps fit, {last_step:,} were planned"
    )
