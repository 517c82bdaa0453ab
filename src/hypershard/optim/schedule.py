"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ..config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, *, last_step: int) -> float:
    """The rate used by step `step` (the first step is 1) of a run planned to end at `last_step`.

    Linear warm-up to `lr` over the first `warmup` share of the horizon (`lr_decay_iters`, else `last_step`),
    then one of:

    | style | after warm-up, with t running from 0 to 1 at the horizon |
    |---|---|
    | constant | lr |
    | linear | min_lr + (lr - min_lr) (1 - t) |
    | cosine | min_lr + (lr - min_lr) (1 + cos(pi t)) / 2 |
    | exponential | lr (min_lr / lr)^t |
    | plateau | lr for the `plateau` share of the horizon, then cosine |
    | wsd | lr for the `plateau` share of the horizon, then linear (warm-up, stable, decay) |

    From the horizon on it stays at `min_lr` (`constant`: at `lr`).
    """
    horizon = optim.lr_decay_iters or last_step
    # At least one warm-up step when there is a warm-up at all, and step 1 never trains at rate 0.
    warmup_steps = math.ceil(optim.warmup * horizon)
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    if optim.lr_decay_style == "constant":
        return optim.lr
    held_steps = math.floor(optim.plateau * horizon) if optim.lr_decay_style in ("plateau", "wsd") else 0
    decay_starts_at = warmup_steps + held_steps
    t = min(1.0, max(0.0, (step - decay_starts_at) / max(1, horizon - decay_starts_at)))
    if optim.lr_decay_style == "exponential":
        return optim.lr * (optim.min_lr / optim.lr) ** t
    shape = (1 + math.cos(math.pi * t)) / 2 if optim.lr_decay_style in ("cosine", "plateau") else 1 - t
    return optim.min_lr + (optim.lr - optim.min_lr) * shape
