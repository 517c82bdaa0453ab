"""How often a tier is saved to, what it is owed, and an interval that finds itself."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import best_every, best_interval_seconds, is_due

AUTO = "auto"
_FIRST_AUTO_STEP = 10  # the first save of an automatic interval, by which it is measured
_NUM_MEASURED = 3  # saves after which an automatic interval stays: the first one includes warming up
_LARGEST_STALL_SHARE = 0.01  # of the training time


@dataclass(frozen=True)
class Measured:
    """What a save of a tier cost: seconds the training stood still, and seconds until it was written."""

    stall_seconds: float
    write_seconds: float


class Cadence:
    """Every `every` steps. None: only when asked and at the end; 0: never; "auto": see `measure`."""

    def __init__(self, every: int | str | None):
        self._is_auto = every == AUTO
        self.every = None if isinstance(every, str) else every
        self._num_saves = 0
        self._num_measured = 0
        self._is_owed = False

    @property
    def is_on(self) -> bool:
        return self.every != 0

    def is_due(self, step: int, *, asked: bool, is_busy: bool) -> bool:
        """Whether to save after `step`. What is due while the last save is still being written is owed from then on."""
        if not self.is_on:
            return False
        every = _FIRST_AUTO_STEP if self._is_auto and self.every is None else self.every
        self._is_owed |= asked or is_due(step, every, None)
        if not self._is_owed or is_busy:
            return False
        self._is_owed = False
        self._num_saves += 1
        return True

    @property
    def awaits_measure(self) -> bool:
        """Whether a save was begun that the interval has not been fitted to. The same on all ranks."""
        return self._is_auto and self._num_measured < min(self._num_saves, _NUM_MEASURED)

    def measure(self, measured: Measured, *, step_seconds: float, failure_seconds: float) -> str:
        """Fit the interval to what a save cost; returns the explanation for the log."""
        self._num_measured += 1
        self.every = best_every(
            stall_seconds=measured.stall_seconds,
            write_seconds=measured.write_seconds,
            step_seconds=step_seconds,
            failure_seconds=failure_seconds,
            share=_LARGEST_STALL_SHARE,
        )
        daly = best_interval_seconds(measured.stall_seconds, failure_seconds)
        return (
            f"every {self.every} steps ({self.every * step_seconds:.1f} s): a save stops training for "
            f"{measured.stall_seconds:.3f} s, so with a failure every {failure_seconds / 3600:.1f} h Daly's optimum is "
            f"{daly:.1f} s; it is written in {measured.write_seconds:.1f} s, and stalls may take at most "
            f"{_LARGEST_STALL_SHARE:.0%} of the time"
        )
