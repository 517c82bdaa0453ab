"""Why a run ends: the reasons as a pure function, and the signals that ask for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from ..checkpoint.manager import NODE_TIERS
from .state import Progress

# What Slurm, SageMaker, Kubernetes and a person send: time limit or preemption, scancel, Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Limits:
    """`last_step` ends the run, a course laid anew sooner.

    `max_seconds` (None: no limit) counts training time over all restarts.
    `ends_at` (None: unknown) is when the cluster ends the job, in seconds since 1970. After `patience` validations in a
    row (None: never) that were not lower than the best before them by the share `min_gain`, the run ends early.
    """

    last_step: int
    max_seconds: float | None
    ends_at: float | None = None
    patience: int | None = None
    min_gain: float = 0.0

    def last_step_of(self, progress: Progress) -> int:
        """The step that ends the run: as configured, or of the course laid anew."""
        return self.last_step if progress.course is None else progress.course.last_step

    def time_over(self, progress: Progress, now: float, reserve_seconds: float) -> str | None:
        """ "hours" or "time limit" when no more than `reserve_seconds` of the run's or the job's time are left."""
        if self.max_seconds is not None and progress.seconds >= self.max_seconds - reserve_seconds:
            return "hours"
        if self.ends_at is not None and now >= self.ends_at - reserve_seconds:
            return "time limit"
        return None


def stop_reason(progress: Progress, limits: Limits, *, asked: str | None) -> str | None:
    """ "steps", "early", or what the ranks agreed was asked for ("hours" or a signal's name), or None to go on.

    "hours" too where a course laid for --max_hours is at its end before the configured steps are.
    """
    if progress.step >= limits.last_step_of(progress):
        return "steps" if progress.step >= limits.last_step else "hours"
    if limits.patience is not None and progress.best is not None and progress.best.num_since >= limits.patience:
        return "early"
    return asked


class SaveWish:
    """Whether it is time for a save that steps do not ask for: some minutes have passed, or SIGUSR2 came."""

    def __init__(self, every_minutes: float | None, *, now: float):
        self._every_seconds = None if every_minutes is None else every_minutes * 60
        self._saved_at = now
        self.is_asked = False

    def is_wanted(self, now: float) -> bool:
        is_late = self._every_seconds is not None and now - self._saved_at >= self._every_seconds
        return self.is_asked or is_late

    def granted(self, tiers: Sequence[str], now: float) -> None:
        """A save to `tiers` was begun; those on the nodes themselves are not what was wished for."""
        if set(tiers) - NODE_TIERS:
            self._saved_at, self.is_asked = now, False


class StopSignals:
    """While active, a signal is remembered instead of ending the process; a second Ctrl-C ends it at once.

    SIGUSR2 asks for a save and no stop.
    """

    def __init__(self, wish: SaveWish) -> None:
        self.received: str | None = None
        self.agreed: str | None = None  # what the ranks agreed to stop for
        self._wish = wish

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self._wish.is_asked = True
            return
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
