"""When to save, where, and what to delete: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv:2407.21783, section 3.3.4), so one GPU
# with its share of host and network fails once in so many hours.
GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419


def is_due(step: int, every: int | None, last_step: int | None) -> bool:
    """Whether something that happens every `every` steps (None: never) and at the last step happens after `step`."""
    if step == last_step:
        return True
    return every is not None and step > 0 and step % every == 0


def steps_to_delete(steps: Iterable[int], *, keep: int, keep_every: int | None = None) -> list[int]:
    """All of `steps` but the `keep` newest and the multiples of `keep_every`, oldest first.

    The newest is never among them, whatever `keep` says.
    """
    ordered = sorted(set(steps))
    old = ordered[: len(ordered) - max(keep, 1)] if len(ordered) > max(keep, 1) else []
    return [step for step in old if keep_every is None or step % keep_every]


def mean_seconds_between_failures(num_gpus: int, *, mtbf_hours: float | None) -> float:
    """Of the whole job: `mtbf_hours` where given, else what large published runs met, scaled to this size."""
    hours = GPU_HOURS_BETWEEN_FAILURES / num_gpus if mtbf_hours is None else mtbf_hours
    return hours * 3600


def best_interval_seconds(save_seconds: float, failure_seconds: float) -> float:
    """Time between saves that loses least to saving and to work done again.

    Daly's higher-order estimate (Future Generation Computer Systems 22, 2006, eq. 37); its first term is Young's
    sqrt(2 * cost * MTBF). `save_seconds` is what one save takes from the training, not how long writing lasts.
    """
    if save_seconds >= 2 * failure_seconds:
        return failure_seconds
    ratio = math.sqrt(save_seconds / (2 * failure_seconds))
    first_order = math.sqrt(2 * save_seconds * failure_seconds)
    return first_order * (1 + ratio / 3 + ratio * ratio / 9) - save_seconds


def best_every(
    *, stall_seconds: float, write_seconds: float, step_seconds: float, failure_seconds: float, share: float
) -> int:
    """Steps between saves of a tier: Daly's interval, but the stall at most `share` of the time, and no save due
    before the last one is written."""
    interval = max(
        best_interval_seconds(stall_seconds, failure_seconds),
        stall_seconds / share,
        write_seconds * 1.25,  # a quarter of slack, since writing times vary
    )
    return max(1, math.ceil(interval / step_seconds))


def seconds_to_stop(*, write_seconds: float, step_seconds: float) -> float:
    """How long before a time limit to stop so that the last save fits: twice what a save took, and two steps."""
    return 2 * write_seconds + 2 * step_seconds
