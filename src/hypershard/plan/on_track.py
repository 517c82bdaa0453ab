"""Whether a run keeps to its plan: hours planned, spent and left. Pure arithmetic, no clock is read here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Planned hours over those it really takes; inside this the plan was good, and a run is on track.
GOOD_ACCURACY = (0.85, 1.15)
# The median of so many last steps tells the pace: a save or a validation among them does not show.
PACE_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class OnTrack:
    """Where a run stands. None: not known yet (no step was measured), or of `actual_hours`: not at its end.

    `time_accuracy`: planned over actual hours (at the end), over those now expected (before). `steps_per_hour` is the
    pace of the last steps, `elapsed_hours + remaining_hours` what the whole will take at that pace.
    """

    estimated_hours: float
    elapsed_hours: float
    remaining_hours: float | None
    actual_hours: float | None
    steps_per_hour: float | None
    time_accuracy: float | None

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
            "training/on_track": None if self.on_track is None else float(self.on_track),
        }
        return {name: value for name, value in values.items() if value is not None}


def on_track(
    *, estimated_hours: float, elapsed_seconds: float, step: int, last_step: int, step_seconds: Sequence[float]
) -> OnTrack:
    """Where a run stands after `step` of `last_step`, given the seconds of its steps so far (the last 50 count).

    `elapsed_seconds` are over all restarts, as `estimated_hours` are for the whole run.
    """
    elapsed_hours = elapsed_seconds / 3600
    pace = statistics.median(step_seconds[-PACE_STEPS:]) if step_seconds else None
    ended = step >= last_step
    if ended:
        remaining: float | None = 0.0
    else:
        remaining = None if pace is None else (last_step - step) * pace / 3600
    total = None if remaining is None else elapsed_hours + remaining
    return OnTrack(
        estimated_hours=estimated_hours,
        elapsed_hours=elapsed_hours,
        remaining_hours=remaining,
        actual_hours=elapsed_hours if ended else None,
        steps_per_hour=3600 / pace if pace else None,
        time_accuracy=estimated_hours / total if total else None,
    )
