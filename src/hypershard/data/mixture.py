"""Several sources in fixed proportions: which of them a sample comes from is a pure function of its position.

Weights become whole numbers, whose sum is a period. Within a period sources take turns so that after any number of
samples each is less than one sample away from its share; after whole periods the proportions are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

MAX_PERIOD = 10**5  # a table of this many entries is made once


class Mixture:
    """Turns of sources with these weights. DataError: weights that need a longer period."""

    def __init__(self, weights: Sequence[Fraction]):
        assert weights and all(weight > 0 for weight in weights), weights
        total = sum(weights)
        period = math.lcm(*((weight / total).denominator for weight in weights))
        if period > MAX_PERIOD:
            raise DataError(
                f"--dataset: the weights {', '.join(str(float(weight)) for weight in weights)} repeat only after "
                f"{period} samples; expected at most {MAX_PERIOD}: give them with fewer digits"
            )
        self.period = period
        counts = [int(weight / total * period) for weight in weights]
        self._counts = np.array(counts, dtype=np.int64)
        self._turns = _turns(counts)
        # How often each source had its turn before each place of the period.
        self._before = np.zeros((len(weights), period + 1), dtype=np.int64)
        for source in range(len(weights)):
            np.cumsum(self._turns == source, out=self._before[source, 1:])

    @property
    def shares(self) -> list[float]:
        """Of all samples, each source's."""
        return (self._counts / self.period).tolist()  # type: ignore[no-any-return]

    def turns(
        self, indices: NDArray[np.int64], *, lanes: NDArray[np.int64], num_lanes: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of sample indices[i] of lane lanes[i], and how many samples of that source the lane had before it.

        Lanes begin at different places of the period, so that every step, which takes from all, is well mixed.
        """
        phases = lanes * self.period // num_lanes
        sources = self._turns[(phases + indices) % self.period]
        return sources, self._count(sources, phases + indices) - self._count(sources, phases)

    def _count(self, sources: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        periods, rest = np.divmod(places, self.period)
        return periods * self._counts[sources] + self._before[sources, rest]


def _turns(counts: Sequence[int]) -> NDArray[np.int64]:
    """Each place of a period to the source that is furthest behind its share there."""
    shares = np.array(counts, dtype=np.float64) / sum(counts)
    taken = np.zeros(len(counts))
    turns = np.empty(sum(counts), dtype=np.int64)
    for place in range(len(turns)):
        source = int(np.argmax(shares * (place + 1) - taken))
        turns[place] = source
        taken[source] += 1
    return turns


def parse_dataset(dataset: str) -> list[tuple[str, Fraction | None]]:
    """`a:0.7,b:0.3` -> names with weights; a name alone has None. DataError: weights on some only, or not positive."""
    parts = [part.strip() for part in dataset.split(",")]
    if not all(parts):
        raise DataError(f"--dataset={dataset}: found an empty name; expected names divided by single commas")
    named = [_named(part) for part in parts]
    if len(named) == 1:
        return [(named[0][0], None)]
    with_weight = [weight for _, weight in named if weight is not None]
    if with_weight and len(with_weight) < len(named):
        raise DataError(f"--dataset={dataset}: found weights on some data sets; expected one on each, or on none")
    if any(weight <= 0 for weight in with_weight):
        raise DataError(f"--dataset={dataset}: found a weight of 0 or below; leave that data set out")
    return named


def _named(part: str) -> tuple[str, Fraction | None]:
    name, colon, weight = part.rpartition(":")
    if not colon or not name:
        return part, None
    try:
        return name, Fraction(weight)
    except (ValueError, ZeroDivisionError):  # a colon of the name itself, as in s3://
        return part, None
