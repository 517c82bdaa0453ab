"""Steps -> this rank's batches, made ahead beside the training; and validation's batches.

At position P the global batch is the samples at [P, P + G), G = accumulation * world_size * batch_size; micro-step m of
rank r holds at item b the sample at P + (m * world_size + r) * batch_size + b. What a run resumes from is the position,
and for streams the lanes' cursors.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .feed import Feed, Place
from .mixture import Mixture
from .packing import Batch, batch_of
from .rows import Rows

_STOP_SECONDS = 5.0  # for the thread to finish the step it is at

_Begun = list[list[Place]]  # a step's samples by micro-step, whose rows have been asked for


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each global batch is this rank's."""

    rank: int
    world_size: int
    batch_size: int

    def positions(self, first: int, micro_step: int) -> NDArray[np.int64]:
        """Positions [batch_size] of a micro-step of the step that begins at position `first`."""
        begin = first + (micro_step * self.world_size + self.rank) * self.batch_size
        return np.arange(begin, begin + self.batch_size, dtype=np.int64)

    def step_size(self, accumulation: int) -> int:
        """Samples of a step over all ranks."""
        return accumulation * self.world_size * self.batch_size


@dataclass(frozen=True)
class _Made:
    """A step's batches, and what they use up of streams."""

    batches: list[Batch]
    used: list[tuple[Place, NDArray[np.int64]]]


class Loader:
    """This rank's training batches. A thread makes `prefetch_steps` ahead; `pin`: in memory a GPU can copy from."""

    def __init__(self, feed: Feed, share: Share, *, context_tokens: int, prefetch_steps: int, pin: bool):
        self._feed = feed
        self._share = share
        self._context_tokens = context_tokens
        self._prefetch_steps = prefetch_steps
        self._pin = pin
        self._ahead: _Ahead | None = None

    def step(self, first_position: int, *, accumulation: int) -> list[Batch]:
        """This rank's micro-batches of the optimizer step whose first sample is at `first_position`.

        DataError: what reading them raises, at the step that needs them.
        """
        made = self._next(first_position, accumulation)
        for place, cursor in made.used:
            self._feed.use_up(place, cursor)
        return made.batches

    def _next(self, first_position: int, accumulation: int) -> _Made:
        if not self._prefetch_steps:
            return self._make(self._begin(first_position, accumulation=accumulation))
        step_size = self._share.step_size(accumulation)
        if self._ahead is not None and self._ahead.expected != (first_position, step_size):
            self.close()
        if self._ahead is None:
            self._ahead = _Ahead(
                partial(self._begin, accumulation=accumulation),
                self._make,
                first_position=first_position,
                step_size=step_size,
                num_steps=self._prefetch_steps,
            )
        return self._ahead.take()

    def close(self) -> None:
        """End the thread and the workers; the next step starts others. What was made ahead is made again then."""
        if self._ahead is not None:
            self._ahead.stop()
        self._ahead = None
        self._feed.close()

    def restore(self, num_lanes: int, *, cursors: str | None) -> None:
        """Go on with lanes and cursors as a checkpoint has them; see `Feed.restore`."""
        self.close()
        self._feed.restore(num_lanes, cursors=cursors)

    def _begin(self, first_position: int, *, accumulation: int) -> _Begun:
        """Ask for a step's rows."""
        share = self._share
        places = [self._feed.places(share.positions(first_position, number)) for number in range(accumulation)]
        for micro_step in places:
            self._feed.ask(micro_step)
        return places

    def _make(self, places: _Begun) -> _Made:
        """The batches of a step whose rows have been asked for."""
        batches, used = [], []
        for micro_step in places:
            rows = []
            for place in micro_step:
                row, cursor = self._feed.take(place)
                rows.append(row)
                if cursor is not None:
                    used.append((place, cursor))
            batch = batch_of(rows, context_tokens=self._context_tokens)
            batches.append(batch.pinned() if self._pin else batch)
        return _Made(batches, used)


class _Ahead:
    """A thread that makes the steps from `first_position` on, `num_steps` ahead of those taken.

    `begin` asks for the rows of the step at a position, `make` makes its batches. `expected`: the first position and
    the size of the step that comes next.
    """

    def __init__(
        self,
        begin: Callable[[int], _Begun],
        make: Callable[[_Begun], _Made],
        *,
        first_position: int,
        step_size: int,
        num_steps: int,
    ):
        self.expected = (first_position, step_size)
        self._begin = begin
        self._make = make
        self._num_steps = num_steps
        self._made: queue.Queue[_Made | Exception] = queue.Queue(maxsize=num_steps)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hypershard-loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        position, step_size = self.expected
        begun: deque[_Begun] = deque()
        try:
            while not self._is_stopped.is_set():
                while len(begun) < self._num_steps:  # workers are at later steps while this one is put together
                    begun.append(self._begin(position))
                    position += step_size
                self._put(self._make(begun.popleft()))
        except Exception as error:  # raised where the step is taken
            self._put(error)

    def _put(self, made: _Made | Exception) -> None:
        while not self._is_stopped.is_set():
            try:
                return self._made.put(made, timeout=0.1)
            except queue.Full:
                continue
        return None

    def take(self) -> _Made:
        made = self._made.get()
        if isinstance(made, Exception):
            self._made.put(made)  # for whoever asks again
            raise made
        first_position, step_size = self.expected
        self.expected = (first_position + step_size, step_size)
        return made

    def stop(self) -> None:
        self._is_stopped.set()
        with contextlib.suppress(queue.Empty):  # let it put what it holds and see the flag
            while True:
                self._made.get_nowait()
        self._thread.join(_STOP_SECONDS)


def validation_batches(
    sources: Sequence[Rows], mixture: Mixture, share: Share, *, context_tokens: int, num_batches: int
) -> Iterator[Batch]:
    """`num_batches` batches of equal shape, each source in its own order, no row on two ranks or twice.

    Sources take turns as in training. Where rows run out, ranks get batches whose labels are all ignored: every rank
    must run the same number of forward passes.
    """
    for number in range(num_batches):
        positions = share.positions(0, number)
        turns = mixture.turns(positions, lanes=np.zeros_like(positions), num_lanes=1)
        pairs = zip(*(part.tolist() for part in turns), strict=True)
        rows = [sources[source].row(index) for source, index in pairs]
        yield batch_of(rows, context_tokens=context_tokens)
