"""When to save and what to delete: pure functions of step numbers."""

from __future__ import annotations

from collections.abc import Iterable


def is_due(step: int, every: int | None, last_step: int | None) -> bool:
    """Whether something that happens every `every` steps (None: never) and at the last step happens after `step`."""
    if step == last_step:
        return True
    return every is not None and step > 0 and step % every == 0


def steps_to_delete(steps: Iterable[int], keep: int) -> list[int]:
    """All of `steps` but the `keep` newest, oldest first. The newest is never among them, whatever `keep` says."""
    ordered = sorted(set(steps))
    return ordered[: len(ordered) - max(keep, 1)] if len(ordered) > max(keep, 1) else []
