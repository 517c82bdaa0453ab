import itertools
import math

import pytest

from hypershard.config.schema import OptimConfig
from hypershard.optim.schedule import learning_rate


def rates(last_step: int = 100, **settings: object) -> list[float]:
    optim = OptimConfig(lr=1.0, min_lr=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, optim, last_step=last_step) for step in range(1, last_step + 1)]


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential"])
def test_decays_from_peak_to_minimum(style: str) -> None:
    values = rates(lr_decay_style=style, warmup=0.1)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[9] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(values[9:]))


def test_values_in_the_middle() -> None:
    # warm-up of 0 steps, step 50 of 100: t = 0.5
    assert rates(lr_decay_style="cosine", warmup=0.0)[49] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates(lr_decay_style="linear", warmup=0.0)[49] == pytest.approx(0.55)
    assert rates(lr_decay_style="exponential", warmup=0.0)[49] == pytest.approx(math.sqrt(0.1))


def test_constant_stays() -> None:
    assert set(rates(lr_decay_style="constant", warmup=0.0)) == {1.0}


@pytest.mark.parametrize("style", ["wsd", "plateau"])
def test_holds_the_peak(style: str) -> None:
    values = rates(lr_decay_style=style, warmup=0.1, plateau=0.7)
    assert values[9:80] == [1.0] * 71
    assert values[80] < 1.0
    assert values[-1] == pytest.approx(0.1)
    if style == "wsd":  # a straight line down
        assert values[89] == pytest.approx(0.55)


def test_horizon_shorter_than_the_run_stays_at_the_minimum() -> None:
    values = rates(lr_decay_style="cosine", lr_decay_iters=50, warmup=0.0)
    assert values[49:] == pytest.approx([0.1] * 51)


def test_the_first_step_never_trains_at_zero_and_never_exceeds_the_peak() -> None:
    for warmup in (0.0, 0.0032, 0.5, 1.0):
        values = rates(warmup=warmup)
        assert 0 < values[0] <= 1.0
        assert max(values) <= 1.0
