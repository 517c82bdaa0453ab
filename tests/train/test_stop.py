"""When a run ends and when it saves, by the clock and by signals."""

import dataclasses
import os
import signal

from hypershard.train.state import Progress, judged
from hypershard.train.stop import Limits, SaveWish, StopSignals, stop_reason


def test_a_run_stops_early_enough_for_its_last_save() -> None:
    limits = Limits(last_step=100, max_seconds=60.0, ends_at=1000.0)
    at = {"reserve_seconds": 10.0}
    assert limits.time_over(Progress(seconds=49.0), now=900.0, **at) is None
    assert limits.time_over(Progress(seconds=50.0), now=900.0, **at) == "hours"
    assert limits.time_over(Progress(seconds=1.0), now=989.0, **at) is None
    assert limits.time_over(Progress(seconds=1.0), now=990.0, **at) == "time limit"
    assert Limits(last_step=1, max_seconds=None).time_over(Progress(seconds=1e9), now=1e12, **at) is None


def test_minutes_ask_for_a_save_that_leaves_the_node() -> None:
    wish = SaveWish(30.0, now=0.0)
    assert not wish.is_wanted(1799.0)
    assert wish.is_wanted(1800.0)
    wish.granted(["memory"], 1800.0)
    assert wish.is_wanted(1801.0), "memory is not what was wished for"
    wish.granted(["memory", "disk"], 1802.0)
    assert not wish.is_wanted(3601.0)
    assert wish.is_wanted(3602.0)
    assert not SaveWish(None, now=0.0).is_wanted(1e9)


def test_sigusr2_asks_for_a_save_and_no_stop() -> None:
    wish = SaveWish(None, now=0.0)
    before = signal.getsignal(signal.SIGUSR2)
    with StopSignals(wish) as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert wish.is_wanted(0.0) and signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_run_ends_early_when_validations_get_no_better() -> None:
    """By at least 1 % of the best; a loss that is no number is no better either."""
    limits, progress = Limits(last_step=100, max_seconds=None, patience=2, min_gain=0.01), Progress()
    reasons, steps = [], []
    for step, loss in enumerate([5.0, 4.0, 3.97, 3.0, float("nan"), 2.99, 2.0], 1):
        progress = judged(dataclasses.replace(progress, step=step), loss, min_gain=limits.min_gain)
        reasons.append(stop_reason(progress, limits, asked=None))
        steps.append(progress.best_step)
    assert steps == [1, 2, 2, 4, 4, 4, 7]
    assert reasons == [None, None, None, None, None, "early", None]
    assert stop_reason(progress, Limits(100, None), asked=None) is None, "without a patience it never does"
