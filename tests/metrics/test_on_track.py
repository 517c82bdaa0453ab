"""Whether a run keeps to its plan."""

import pytest

from hypershard.metrics.display import describe
from hypershard.metrics.on_track import FIRST_STEPS, MEASURED_STEPS, Forecast, OnTrack, Pace


def after(step: int, seconds: list[float], *, planned: float | None, last_step: int, elapsed: float) -> OnTrack:
    pace = Pace(Forecast(step_seconds=planned, dollars_per_hour=60.0))
    for each in seconds:
        pace.add(each)
    return pace.on_track(elapsed_seconds=elapsed, step=step, last_step=last_step)


def test_a_run_on_its_way() -> None:
    steps = [10.0] * 60 + [4.0] * 50  # the last 50 tell the pace
    state = after(110, steps, planned=7.2, last_step=1000, elapsed=3600)
    assert state.metrics() == pytest.approx(
        {
            "optimization/estimated_hours": 2.0,
            "optimization/time_accuracy": 2 / (1 + 890 * 4 / 3600),
            "training/elapsed_hours": 1.0,
            "training/remaining_hours": 890 * 4 / 3600,
            "training/steps_per_hour": 900,
            "training/on_track": 1.0,
            "training/dollars_spent": 60.0,
            "training/dollars_to_come": 60 * 890 * 4 / 3600,
        }
    )


@pytest.mark.parametrize(("planned", "is_on_track"), [(3.39, False), (3.41, True), (4.59, True), (4.61, False)])
def test_on_track_is_85_to_115_percent(planned: float, is_on_track: bool) -> None:
    state = after(100, [4.0], planned=planned, last_step=1000, elapsed=400)
    assert state.on_track is is_on_track
    assert state.metrics()["training/on_track"] == float(is_on_track)


def test_before_the_first_step_and_after_the_last() -> None:
    before = after(0, [], planned=720.0, last_step=10, elapsed=30)
    assert (before.remaining_hours, before.time_accuracy, before.on_track) == (None, None, None)
    ended = after(10, [900.0], planned=720.0, last_step=10, elapsed=9000)
    assert (ended.remaining_hours, ended.actual_hours, ended.dollars_to_come) == (0.0, 2.5, 0.0)
    assert ended.time_accuracy == pytest.approx(0.8)
    assert ended.metrics()["optimization/actual_hours"] == 2.5
    assert ended.on_track is False


def test_without_a_plan_the_first_steps_measured_are_the_plan() -> None:
    """The very first ones, which compile and fill caches, do not count."""
    pace = Pace(Forecast())
    told = [pace.add(seconds) for seconds in [60.0] * FIRST_STEPS + [2.0] * MEASURED_STEPS + [3.0] * 60]
    assert [index + 1 for index, is_measured in enumerate(told) if is_measured] == [FIRST_STEPS + MEASURED_STEPS]
    state = pace.on_track(elapsed_seconds=1000, step=85, last_step=900)
    assert state.estimated_hours == pytest.approx(900 * 2.0 / 3600)
    assert state.steps_per_hour == 1200
    assert state.dollars_spent is None


def test_what_a_person_reads_of_it() -> None:
    record = {
        "loss": 5.0, "grad_norm": 1.0, "lr": 3e-4, "tokens_per_second": 100.0, "mfu": None, "memory_bytes": 2**30,
        "step_seconds": 4.0, "data_seconds": 0.0,
        **after(500, [4.0], planned=2.0, last_step=1000, elapsed=2000).metrics(),
    }  # fmt: skip
    line = describe(500, 1000, record)
    assert line.endswith("elapsed 33m20s  900 steps/h  slower than planned 50%  $33.33 + $33.33 to come")
