from __future__ import annotations

import math

import pytest

from hypershard.checkpoint.policy import (
    GPU_HOURS_BETWEEN_FAILURES,
    best_every,
    best_interval_seconds,
    is_due,
    mean_seconds_between_failures,
    seconds_to_stop,
    steps_to_delete,
)


@pytest.mark.parametrize(
    ("step", "every", "last_step", "due"),
    [
        (10, 10, None, True),
        (11, 10, None, False),
        (0, 10, None, False),
        (11, 10, 11, True),
        (11, None, 11, True),
        (10, None, 11, False),
        (10, None, None, False),
        (20, 10, 5, True),
    ],
)
def test_is_due(step: int, every: int | None, last_step: int | None, due: bool) -> None:
    assert is_due(step, every, last_step) is due


@pytest.mark.parametrize(
    ("steps", "keep", "deleted"),
    [([30, 10, 20], 2, [10]), ([10], 1, []), ([], 3, []), ([1, 2, 3], 1, [1, 2]), ([1, 2, 2], 2, []), ([1, 2], 0, [1])],
)
def test_steps_to_delete(steps: list[int], keep: int, deleted: list[int]) -> None:
    assert steps_to_delete(steps, keep=keep) == deleted


def test_every_nth_is_kept() -> None:
    assert steps_to_delete(range(10, 101, 10), keep=2, keep_every=30) == [10, 20, 40, 50, 70, 80]


def test_failures_scale_with_the_number_of_gpus() -> None:
    assert round(GPU_HOURS_BETWEEN_FAILURES, -2) == 50_700
    assert mean_seconds_between_failures(16384, mtbf_hours=None) == pytest.approx(3.09 * 3600, rel=1e-3)
    assert mean_seconds_between_failures(16384, mtbf_hours=2.0) == 7200


def work_lost(interval: float, save: float, failure: float) -> float:
    """Expected time for a long run per unit of work, by Daly's exact model of exponential failures."""
    return failure * math.expm1((interval + save) / failure) / interval


@pytest.mark.parametrize(("save", "failure"), [(1.0, 3600.0), (60.0, 3600.0), (0.05, 11124.0), (600.0, 7200.0)])
def test_the_interval_loses_least(save: float, failure: float) -> None:
    best = best_interval_seconds(save, failure)
    lost = work_lost(best, save, failure)
    assert lost <= min(work_lost(best * factor, save, failure) for factor in (0.5, 0.8, 1.25, 2.0))
    assert best_interval_seconds(3 * failure, failure) == failure


def test_no_save_is_due_before_the_last_is_written_and_stalls_stay_small() -> None:
    given = {"step_seconds": 2.0, "failure_seconds": 3600.0, "share": 0.01}
    assert best_every(stall_seconds=0.0, write_seconds=80.0, **given) == 50
    assert best_every(stall_seconds=1.2, write_seconds=0.0, **given) == 60
    assert best_every(stall_seconds=0.0, write_seconds=0.0, **given) == 1


def test_a_stop_leaves_time_for_the_last_save() -> None:
    assert seconds_to_stop(write_seconds=30.0, step_seconds=2.0) == 64.0
