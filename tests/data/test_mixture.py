"""Proportions hold at every length, and lanes share them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hypershard.data.mixture import Mixture, parse_dataset
from hypershard.errors import DataError


def weights(*texts: str) -> list[Fraction]:
    return [Fraction(text) for text in texts]


@pytest.mark.parametrize("shares", [("0.7", "0.3"), ("1", "1", "1"), ("0.123", "0.5", "0.377"), ("2",), ("1", "9999")])
def test_proportions_are_exact_over_periods_and_near_in_between(shares: tuple[str, ...]) -> None:
    mixture = Mixture(weights(*shares))
    indices = np.arange(3 * mixture.period)
    sources, turns = mixture.turns(indices, lanes=np.zeros_like(indices), num_lanes=1)
    total = sum(weights(*shares))
    for source, share in enumerate(weights(*shares)):
        taken = np.cumsum(sources == source)
        assert taken[-1] == 3 * mixture.period * share / total
        assert np.abs(taken - (indices + 1) * float(share / total)).max() < 1 + 1e-9
        assert turns[sources == source].tolist() == list(range(taken[-1]))  # each of its samples once, in order


@pytest.mark.parametrize("num_lanes", [1, 3, 8, 64])
def test_each_lane_counts_its_own_turns_and_all_lanes_together_keep_the_proportions(num_lanes: int) -> None:
    mixture = Mixture(weights("0.7", "0.2", "0.1"))
    positions = np.arange(num_lanes * 200)
    lanes, indices = positions % num_lanes, positions // num_lanes
    sources, turns = mixture.turns(indices, lanes=lanes, num_lanes=num_lanes)
    for lane in range(num_lanes):
        for source in range(3):
            here = (lanes == lane) & (sources == source)
            assert turns[here].tolist() == list(range(int(here.sum())))
    share_of_each_step = (sources.reshape(200, num_lanes) == 0).mean(axis=1)
    if num_lanes >= 8:
        assert np.abs(share_of_each_step - 0.7).max() < 0.2


def test_names_with_weights() -> None:
    assert parse_dataset("a:0.7,b:0.3") == [("a", Fraction("0.7")), ("b", Fraction("0.3"))]
    assert parse_dataset("s3://bucket/x:2, org/name:1") == [("s3://bucket/x", Fraction(2)), ("org/name", Fraction(1))]
    assert parse_dataset("s3://bucket/x") == [("s3://bucket/x", None)]
    assert parse_dataset("a,b") == [("a", None), ("b", None)]
    assert parse_dataset("alone:3") == [("alone", None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("a:0.7,b", "weights on some"), ("a:1,b:0", "0 or below"), ("a:1,b:-1", "0 or below"), ("a,,b", "empty name")],
)
def test_what_is_no_mixture_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_dataset(text)


def test_weights_with_too_many_digits_are_refused() -> None:
    with pytest.raises(DataError, match="fewer digits"):
        Mixture(weights("0.1234567", "0.8765433"))
