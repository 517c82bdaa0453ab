"""Which samples each step of a run trained on, worked out again from what the run recorded.

Positions follow from the step; what lies at a position is a pure function of it, or, in a stream, of the cursors that
were recorded with the checkpoints: from the last ones before the step the lanes are read once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .feed import Feed


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps `first_step` to `last_step` (None: the newest) of a run between two of its starts."""

    first_step: int
    last_step: int | None
    first_position: int
    samples_per_step: int
    num_lanes: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trained sample. `digest` is of its token ids: equal digests, equal samples."""

    step: int
    position: int
    source: str
    documents: tuple[str, ...]
    tokens: NDArray[np.int64]
    digest: str


@dataclass(frozen=True)
class Ledger:
    """What a run's events say of its data: the steps that count, and cursors by the step after which they stood so."""

    segments: tuple[Segment, ...]
    cursors: Mapping[int, str]

    def segment(self, step: int) -> Segment:
        """The start that did `step`. DataError: no such step was recorded."""
        for segment in reversed(self.segments):
            if segment.first_step <= step and (segment.last_step is None or step <= segment.last_step):
                return segment
        raise DataError(f"--step={step}: the run's events.jsonl records no start that did this step")

    def samples(self, feed: Feed, step: int) -> Iterator[Sample]:
        """The samples of `step`, in the order of their positions. `feed` reads the run's data, without workers."""
        segment = self.segment(step)
        before = [saved for saved in self.cursors if saved < step]
        feed.restore(segment.num_lanes, cursors=self.cursors[max(before)] if before else None)
        first = segment.first_position + (step - segment.first_step) * segment.samples_per_step
        positions = np.arange(first, first + segment.samples_per_step)
        for position, place in zip(positions.tolist(), feed.places(positions), strict=True):
            row, _ = feed.take(place)
            yield Sample(
                step=step,
                position=position,
                source=feed.sources[place.source].name,
                documents=tuple(feed.documents(place)),
                tokens=row.tokens,
                digest=hashlib.blake2b(row.tokens.astype("<i8").tobytes(), digest_size=8).hexdigest(),
            )


def read_ledger(events: Sequence[Mapping[str, Any]]) -> Ledger:
    """The ledger in a run's events. Steps that were done again after a restart count as the restart did them.

    DataError: the events record no start.
    """
    segments: list[Segment] = []
    cursors: dict[int, str] = {}
    for event in events:
        if event["event"] == "started" and "samples" in event:
            step = event["step"]
            segments = [_until(segment, step) for segment in segments if segment.first_step <= step]
            # Of data read from their beginning again, nothing before is of use.
            cursors = {saved: kept for saved, kept in cursors.items() if saved <= step and event["samples"]}
            segments.append(
                Segment(
                    first_step=step + 1,
                    last_step=None,
                    first_position=event["samples"],
                    samples_per_step=event["samples_per_step"],
                    num_lanes=event["num_lanes"],
                )
            )
        elif event["event"] == "saved" and event.get("cursors") is not None:
            cursors[event["step"]] = event["cursors"]
        elif event["event"] == "stopped" and segments:
            segments[-1] = _until(segments[-1], event["step"])
    if not segments:
        raise DataError("the run's events.jsonl records no start: it was not trained, or by an older version")
    return Ledger(tuple(segments), cursors)


def _until(segment: Segment, step: int) -> Segment:
    last = step if segment.last_step is None else min(step, segment.last_step)
    return Segment(**(vars(segment) | {"last_step": last}))
