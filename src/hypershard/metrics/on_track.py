"""Whether a run keeps to its plan: hours planned, spent and left. Pure arithmetic, no clock is read here."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

# Planned hours over those it really takes; inside this the plan was good, and a run is on track.
GOOD_ACCURACY = (0.85, 1.15)
# The median of so many last steps tells the pace: a save or a validation among them does not show.
PACE_STEPS = 50
# After so many steps of a process, its first ones (caches, compilation) not among them, the pace counts as measured.
FIRST_STEPS, MEASURED_STEPS = 5, 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the plan says of a run before it starts; None: it cannot tell, or only guess.

    `dollars_per_hour` is for all nodes together.
    """

    step_seconds: float | None = None
    dollars_per_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class OnTrack:
    """Where a run stands. None: not known yet (no step was measured), or of `actual_hours`: not at its end.

    `estimated_hours`: of the plan, or where it has none of the first steps measured. `time_accuracy`: those over actual
    hours (at the end), over those now expected (before). `steps_per_hour` is the pace of the last steps, `elapsed_hours
    + remaining_hours` what the whole will take at that pace. Dollars are None without a price.
    """

    estimated_hours: float | None
    elapsed_hours: float
    remaining_hours: float | None
    actual_hours: float | None
    steps_per_hour: float | None
    time_accuracy: float | None
    dollars_spent: float | None
    dollars_to_come: float | None

    @property
    def on_track(self) -> bool | None:
        """Within 0.85 to 1.15 of the plan; None before the first step."""
        low, high = GOOD_ACCURACY
        return None if self.time_accuracy is None else low <= self.time_accuracy <= high

    def metrics(self) -> dict[str, float]:
        """What is known, by the names that sinks show; `training/on_track` is 1 or 0."""
        values = {
            "optimization/estimated_hours": self.estimated_hours,
            "optimization/actual_hours": self.actual_hours,
            "optimization/time_accuracy": self.time_accuracy,
            "training/elapsed_hours": self.elapsed_hours,
            "training/remaining_hours": self.remaining_hours,
            "training/steps_per_hour": self.steps_per_hour,
            "training/on_track": None if self.on_track is None else float(self.on_track),
            "training/dollars_spent": self.dollars_spent,
            "training/dollars_to_come": self.dollars_to_come,
        }
        return {name: value for name, value in values.items() if value is not None}


class Pace:
    """Seconds of a process's steps as they come, beside what was foreseen of them."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._expected_seconds = forecast.step_seconds
        self._num_steps = 0
        self._last: deque[float] = deque(maxlen=PACE_STEPS)

    def add(self, step_seconds: float) -> bool:
        """Count a step; True once, when enough have been measured to plan by them."""
        self._num_steps += 1
        if self._num_steps == FIRST_STEPS + 1:
            self._last.clear()
        self._last.append(step_seconds)
        is_measured = self._num_steps == FIRST_STEPS + MEASURED_STEPS
        if is_measured and self._expected_seconds is None:
            self._expected_seconds = self.step_seconds()
        return is_measured

    def step_seconds(self) -> float:
        """Of one step at the present pace. At least one step must have been counted."""
        return statistics.median(self._last)

    def on_track(self, *, elapsed_seconds: float, step: int, last_step: int) -> OnTrack:
        """Where the run stands after `step` of `last_step`; `elapsed_seconds` are over all its restarts."""
        elapsed_hours, expected = elapsed_seconds / 3600, self._expected_seconds
        pace = self.step_seconds() if self._last else None
        estimated = None if expected is None else last_step * expected / 3600
        ended = step >= last_step
        if ended:
            remaining: float | None = 0.0
        else:
            remaining = None if pace is None else (last_step - step) * pace / 3600
        total = None if remaining is None else elapsed_hours + remaining
        rate = self._forecast.dollars_per_hour
        return OnTrack(
            estimated_hours=estimated,
            elapsed_hours=elapsed_hours,
            remaining_hours=remaining,
            actual_hours=elapsed_hours if ended else None,
            steps_per_hour=3600 / pace if pace else None,
            time_accuracy=estimated / total if estimated and total else None,
            dollars_spent=None if rate is None else rate * elapsed_hours,
            dollars_to_come=None if rate is None or remaining is None else rate * remaining,
        )
