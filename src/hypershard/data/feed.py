"""Positions -> rows: which source, and which of its rows, stands at each place of the run's order.

Position p counts samples since the start of training and lies in lane p mod L, as its row number p div L. Within a lane
sources take turns (`Mixture`); row k of source s in lane l is the source's sample k * L + l in its shuffled order, or
the next row of lane l of a stream. Without streams L is 1. Nothing here depends on the number of ranks.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .mixture import Mixture
from .order import SampleOrder
from .rows import Row, Rows
from .stream import CURSOR_NUMBERS, StreamSpec
from .workers import Lanes, Wanted


@dataclass(frozen=True, kw_only=True)
class Source:
    """One member of a mixture: rows that can be asked for by number, or a stream."""

    name: str
    weight: Fraction
    rows: Rows | StreamSpec


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample comes from. `sample`: the row's number in an indexable source, in the lane of a stream."""

    source: int
    lane: int
    sample: int


class Feed:
    """One rank's view of the run's samples. `lanes`: how many lanes streams have, which a run keeps for its life."""

    def __init__(self, sources: Sequence[Source], *, seed: int, num_lanes: int, num_workers: int, rank: int):
        self.sources = tuple(sources)
        self._mixture = Mixture([source.weight for source in sources])
        self._orders = [
            None if isinstance(source.rows, StreamSpec) else SampleOrder(source.rows.num_samples, _seed(seed, number))
            for number, source in enumerate(sources)
        ]
        self._streams = [number for number, order in enumerate(self._orders) if order is None]
        self._num_workers = num_workers
        self._rank = rank
        self._lanes: Lanes | None = None
        self.restore(num_lanes if self._streams else 1, cursors=None)

    @property
    def is_stream(self) -> bool:
        return bool(self._streams)

    @property
    def num_samples(self) -> int | None:
        """Samples of one pass over all sources; None where a stream's length is not known."""
        counts = [None if isinstance(source.rows, StreamSpec) else source.rows.num_samples for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def passes(self, num_samples: int) -> str:
        """How often `num_samples` of training read each source, for people."""
        shares = self._mixture.shares
        said = []
        for source, share in zip(self.sources, shares, strict=True):
            name = f" of {source.name}" if len(self.sources) > 1 else ""
            if isinstance(source.rows, StreamSpec):
                said.append(f"{share:.0%}{name} streamed" if name else "streamed")
            else:
                said.append(f"{num_samples * share / source.rows.num_samples:.2f} passes over the data{name}")
        return ", ".join(said)

    # --- where samples are

    def places(self, positions: NDArray[np.int64]) -> list[Place]:
        """What stands at `positions` [n]."""
        indices, lanes = np.divmod(positions, self.num_lanes)
        sources, turns = self._mixture.turns(indices, lanes=lanes, num_lanes=self.num_lanes)
        samples = turns.copy()
        for source, order in enumerate(self._orders):
            if order is not None:
                here = sources == source
                samples[here] = order.at(turns[here] * self.num_lanes + lanes[here])
        return [Place(*numbers) for numbers in zip(sources.tolist(), lanes.tolist(), samples.tolist(), strict=True)]

    # --- reading

    def ask(self, places: Sequence[Place]) -> None:
        """Have the rows of streams made; `take` must follow for each place, in the order of asking."""
        for place in places:
            if self._orders[place.source] is None:
                self._open_lanes().ask(self._wanted(place))

    def take(self, place: Place) -> tuple[Row, NDArray[np.int64] | None]:
        """The row, and its lane's cursor after it if it is a stream's. DataError: damaged data."""
        rows = self.sources[place.source].rows
        if isinstance(rows, StreamSpec):
            return self._open_lanes().take(self._wanted(place))
        return rows.row(place.sample), None

    def documents(self, place: Place) -> list[str]:
        """Where the row at `place` comes from, for people. Of a stream: only right after `take`, without workers."""
        rows = self.sources[place.source].rows
        if isinstance(rows, StreamSpec):
            return self._open_lanes().documents(self._wanted(place))
        return rows.documents(place.sample)

    def _wanted(self, place: Place) -> Wanted:
        return Wanted(self._streams.index(place.source), place.lane, place.sample)

    def _open_lanes(self) -> Lanes:
        if self._lanes is None:
            specs = [source.rows for source in self.sources if isinstance(source.rows, StreamSpec)]
            self._lanes = Lanes(specs, self.cursors, num_workers=self._num_workers, rank=self._rank)
        return self._lanes

    # --- what a checkpoint keeps

    def use_up(self, place: Place, cursor: NDArray[np.int64]) -> None:
        """Training has the row of a stream at `place`; `cursor` came with it."""
        self.cursors[self._streams.index(place.source), place.lane] = cursor

    def restore(self, num_lanes: int, *, cursors: str | None) -> None:
        """Go on with lanes and cursors as a checkpoint has them (`encoded_cursors`); None: from the beginning."""
        self.close()
        shape = (len(self._streams), num_lanes, CURSOR_NUMBERS)
        self.num_lanes = num_lanes
        if cursors is None:
            self.cursors = np.zeros(shape, dtype=np.int64)
            return
        numbers = np.frombuffer(base64.b64decode(cursors, validate=True), dtype="<i8")
        if numbers.size != np.prod(shape):
            raise CheckpointError(
                f"the checkpoint has {numbers.size} numbers of stream cursors; expected {int(np.prod(shape))} for "
                f"{len(self._streams)} streams with {num_lanes} lanes"
            )
        self.cursors = numbers.reshape(shape).astype(np.int64)

    def close(self) -> None:
        """End the workers."""
        if self._lanes is not None:
            self._lanes.close()
        self._lanes = None


def merged_cursors(of_ranks: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Each lane's cursor as the rank has it that read the lane last."""
    stacked = np.stack(of_ranks)  # [ranks, streams, lanes, 6]
    newest = stacked[..., 0].argmax(axis=0)
    return np.take_along_axis(stacked, newest[None, ..., None], axis=0)[0]


def encoded_cursors(cursors: NDArray[np.int64]) -> str:
    """Always as long for as many lanes, so that room for it can be set aside before."""
    return base64.b64encode(cursors.astype("<i8").tobytes()).decode("ascii")


def _seed(seed: int, source: int) -> int:
    """The first source's is the run's own, so that a data set alone is ordered as ever."""
    if source == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {source}".encode(), digest_size=8).digest(), "little")
