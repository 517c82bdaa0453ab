"""From what a shallow model's training allocates to what a deep one's does: one layer's events, repeated.

All layers between the first and the last ones do the same. Where each allocation is made and where it ends is told by
layer and by place in that layer, so a layer more is the same events again, with neighbours moved along. What comes out
is the sequence that tracing the deep model would have recorded, and the allocator can be replayed on it: what it wastes
between blocks does not grow evenly with depth, so it cannot be extrapolated from numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .allocator import NO_LAYER, Event


class Unrepeatable(Exception):
    """The events of a layer do not go with those of its neighbours."""


@dataclass(frozen=True)
class _Segment:
    """Consecutive events of one layer in one phase. `visit`: how often that layer has been in that phase before."""

    window: str
    layer: int
    visit: int
    events: Sequence[Event]


@dataclass(frozen=True)
class _Birth:
    """Which allocation of which segment; `copy` tells apart what is repeated outside of layers."""

    window: str
    visit: int
    layer: int
    number: int
    copy: int = 0


def unroll(events: Sequence[Event], *, owners: Mapping[int, int], layer: int, more: int) -> list[Event]:
    """`events` of a model that has `more` layers like `layer` after it.

    `owners`: the layer of blocks that are allocated outside of all layers, such as weights. Raises Unrepeatable.
    """
    return list(_Unrolling(list(_segments(events)), owners, layer, more).play())


def _segments(events: Iterable[Event]) -> Iterator[_Segment]:
    visits: Counter[tuple[str, int]] = Counter()
    for place, group in itertools.groupby(events, key=lambda event: (event.window, event.layer)):
        yield _Segment(*place, visits[place], list(group))
        visits[place] += 1


class _Unrolling:
    def __init__(self, segments: Sequence[_Segment], owners: Mapping[int, int], layer: int, more: int) -> None:
        self._segments, self._layer, self._more = segments, layer, more
        self._births: dict[int, _Birth] = {}  # by the block's number in the shallow model
        self._owners = dict(owners)
        self._mortal: set[int] = set()
        for segment in segments:
            numbers = itertools.count()
            for event in segment.events:
                if event.is_new:
                    self._births[event.block] = _Birth(segment.window, segment.visit, segment.layer, next(numbers))
                    continue
                self._mortal.add(event.block)
                if self._births[event.block].layer == NO_LAYER != segment.layer:
                    self._owners[event.block] = segment.layer
        self._alive: dict[_Birth, Event] = {}
        self._num_blocks = self._num_mortal = 0

    def play(self) -> Iterator[Event]:
        for segment in self._segments:
            for layer in self._layers_of(segment):
                yield from self._play(segment, layer)
        if self._num_mortal:
            raise Unrepeatable(f"{self._num_mortal} allocations of the layers that were added never end")

    def _layers_of(self, segment: _Segment) -> Sequence[int]:
        """The layers of the deep model that do what this segment does, in the order of time."""
        if segment.layer != self._layer:
            return (self._moved(segment.layer),)
        layers = range(self._layer, self._layer + self._more + 1)
        return layers[::-1] if segment.window.startswith("backward") else layers

    def _moved(self, layer: int) -> int:
        return layer + self._more if layer > self._layer else layer

    def _play(self, segment: _Segment, layer: int) -> Iterator[Event]:
        for event in segment.events:
            for birth in self._births_of(event, segment, layer):
                if event.is_new:
                    self._num_blocks += 1
                    now = event._replace(block=self._num_blocks, layer=layer)
                    self._alive[birth] = now
                    self._num_mortal += event.block in self._mortal
                else:
                    begun = self._alive.pop(birth, None)
                    if begun is None or begun.num_bytes != event.num_bytes or begun.stream != event.stream:
                        raise Unrepeatable(f"{birth}: begun as {begun}, ends as {event}")
                    self._num_mortal -= 1
                    now = event._replace(block=begun.block, layer=layer)
                yield now

    def _births_of(self, event: Event, segment: _Segment, layer: int) -> list[_Birth]:
        """The allocations of the deep model that begin or end where `segment` is `layer`'s."""
        birth = self._births[event.block]
        copies = range(self._more + 1)
        if birth.layer == NO_LAYER:
            if self._owners.get(event.block) != self._layer:
                return [birth]
            if segment.layer == self._layer:
                return [dataclasses.replace(birth, copy=layer - self._layer)]
            return [dataclasses.replace(birth, copy=copy) for copy in copies]
        if segment.layer == NO_LAYER:
            if birth.layer != self._layer:
                return [dataclasses.replace(birth, layer=self._moved(birth.layer))]
            return [dataclasses.replace(birth, layer=self._layer + copy) for copy in copies]
        # What ends in another layer than it began in ends a layer or two away: FSDP2 fetches ahead and frees behind.
        return [dataclasses.replace(birth, layer=layer + birth.layer - segment.layer)]
