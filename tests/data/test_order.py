from __future__ import annotations

import numpy as np
import pytest

from hypershard.data.order import SampleOrder


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 16, 17, 31, 64, 65, 101, 1000, 4099])
def test_every_epoch_is_a_permutation(num_samples):
    order = SampleOrder(num_samples, seed=3)
    for epoch in range(4):
        samples = order.samples(epoch * num_samples, num_samples)
        assert sorted(samples.tolist()) == list(range(num_samples))


def test_any_part_is_the_same_part_of_the_whole():
    order = SampleOrder(101, seed=9)
    whole = order.samples(0, 505)  # five epochs
    for first, count in ((0, 1), (99, 4), (100, 202), (404, 101), (17, 0)):
        np.testing.assert_array_equal(order.samples(first, count), whole[first : first + count])


def test_positions_anywhere_are_those_of_the_whole():
    order = SampleOrder(5000, seed=9)
    whole = SampleOrder(5000, seed=9).samples(0, 20_000)
    chance = np.random.default_rng(1)
    for _ in range(20):
        positions = chance.integers(0, 20_000, size=7)
        np.testing.assert_array_equal(order.at(positions), whole[positions])


def test_epochs_and_seeds_differ():
    orders = [tuple(SampleOrder(101, seed).samples(epoch * 101, 101)) for seed in (0, 1, 2**40) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(101)) not in orders


def test_all_orders_of_three_samples_occur():
    order = SampleOrder(3, seed=0)
    seen = {tuple(order.samples(3 * epoch, 3)) for epoch in range(200)}
    assert len(seen) == 6


def test_samples_are_spread_evenly():
    # The first tenth of an epoch holds about a tenth of each region of the data.
    first_tenth = SampleOrder(100_000, seed=1).samples(0, 10_000)
    counts, _ = np.histogram(first_tenth, bins=20, range=(0, 100_000))
    assert counts.min() > 400 and counts.max() < 600  # 500 each; 600 is 4.6 standard deviations off
    neighbours = np.abs(np.diff(first_tenth))
    assert 30_000 < neighbours.mean() < 37_000  # a third of the range, as for independent draws


def test_a_huge_data_set_needs_no_table():
    samples = SampleOrder(10**12, seed=1).samples(5 * 10**11, 64)
    assert len(set(samples.tolist())) == 64 and samples.max() < 10**12
