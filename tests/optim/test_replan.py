"""A run in a window: what fits, and a schedule whose past stays what it was."""

import dataclasses

import pytest

from hypershard.config.schema import OptimConfig
from hypershard.optim.replan import replanned, reserve_hours, steps_that_fit
from hypershard.optim.schedule import learning_rate


def test_half_an_hour_is_kept_and_less_of_short_windows() -> None:
    assert [reserve_hours(hours) for hours in (48, 12, 10, 2, 0.1)] == pytest.approx([0.5, 0.5, 0.5, 0.1, 0.005])


def test_steps_that_fit_are_whole() -> None:
    assert [steps_that_fit(seconds=seconds, step_seconds=2.0) for seconds in (-5, 0, 1.9, 2, 7)] == [0, 0, 0, 1, 3]


WSD = OptimConfig(lr=1e-3, min_lr=1e-5, lr_decay_style="wsd", plateau=0.8, warmup=0.0132)


@pytest.mark.parametrize("optim", [WSD, dataclasses.replace(WSD, warmup=0.0)], ids=["warmup", "no warmup"])
@pytest.mark.parametrize("step", [1, 20, 400, 790])
@pytest.mark.parametrize("step_seconds", [0.5, 1.3, 4.0])
def test_replanning_moves_the_decay_and_no_rate_that_was_used(
    optim: OptimConfig, step: int, step_seconds: float
) -> None:
    left = (1000 - step) * 1.0
    anew = replanned(optim, step=step, last_step=1000, asked_steps=1500, step_seconds=step_seconds, seconds_left=left)
    assert anew.last_step == min(1500, step + int(left / step_seconds))
    for done in range(1, step + 1):
        assert learning_rate(done, anew.optim, last_step=anew.last_step) == pytest.approx(
            learning_rate(done, optim, last_step=1000)
        )
    assert learning_rate(anew.last_step, anew.optim, last_step=anew.last_step) == pytest.approx(optim.min_lr)
    assert anew.optim.warmup + anew.optim.plateau <= 1


def test_replanned_shares_are_whole_steps_whatever_is_left() -> None:
    for left in range(20, 400):  # the decay would begin before step 790, so it begins right after it
        anew = replanned(WSD, step=790, last_step=1000, asked_steps=1000, step_seconds=2.0, seconds_left=left * 1.0)
        begins = max(790, 14 + int(0.8 * anew.last_step))
        assert learning_rate(begins, anew.optim, last_step=anew.last_step) == WSD.lr
        assert learning_rate(begins + 1, anew.optim, last_step=anew.last_step) < WSD.lr


def test_replanning_leaves_what_cannot_be_moved() -> None:
    given = {"last_step": 1000, "asked_steps": 1000, "seconds_left": 100.0, "step_seconds": 1.0}
    decaying = replanned(WSD, step=899, **given | {"seconds_left": 50.0})
    assert (decaying.last_step, decaying.optim) == (1000, WSD)
    assert "decay began after step 814" in decaying.why
    cosine = dataclasses.replace(WSD, lr_decay_style="cosine", plateau=0.0)
    before = replanned(cosine, step=0, **given)  # nothing was done yet, so any style can be laid anew
    assert (before.last_step, before.optim) == (100, cosine)
    kept = replanned(cosine, step=100, **given)
    assert (kept.last_step, kept.optim) == (1000, cosine)
    assert "lr_decay_style=wsd" in kept.why
    constant = dataclasses.replace(WSD, lr_decay_style="constant", plateau=0.0)
    assert replanned(constant, step=100, **given).last_step == 200
    as_planned = replanned(WSD, step=900, **given)
    assert (as_planned.last_step, as_planned.optim) == (1000, WSD)
    hardly = replanned(WSD, step=5, **given | {"seconds_left": 2.0})
    assert hardly.last_step == 1000
    assert "warm-up" in hardly.why
