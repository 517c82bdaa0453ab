"""Why a run ends: the reasons as a pure function, and the signals that ask for it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

from .state import Progress

# What Slurm, SageMaker, Kubernetes and a person send: time limit or preemption, scancel, Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Limits:
    """`last_step` ends the run; `max_seconds` (None: no limit) counts training time over all restarts."""

    last_step: int
    max_seconds: float | None

    def hours_over(self, progress: Progress) -> str | None:
        """ "hours" when the run has had its time, else None."""
        return "hours" if self.max_seconds is not None and progress.seconds >= self.max_seconds else None


def stop_reason(progress: Progress, limits: Limits, *, asked: str | None) -> str | None:
    """ "steps", or what the ranks agreed was asked for ("hours" or a signal's name), or None to go on."""
    if progress.step >= limits.last_step:
        return "steps"
    return asked


class StopSignals:
    """While active, a signal is remembered instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
