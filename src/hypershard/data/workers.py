"""Processes that fill the lanes of streams beside the training, and what happens when one of them dies.

A lane belongs to one worker, which is asked for its rows in the order in which they are needed. Each row comes back
with the cursor that follows it; a worker that dies is replaced by one that goes on from the cursors its rows came with,
so what the training sees does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..log import logger, setup_logging
from .records import Encoder
from .rows import Row
from .stream import Cursor, Lane, StreamSpec

MAX_DEATHS = 3  # of one worker, before the data are refused: what kills it (memory, a broken library) will again
_STOP_SECONDS = 5.0
# Rows a worker knows to be wanted. More would fill the pipe, and both sides would wait for the other to read.
_MAX_UNDER_WAY = 64


@dataclass(frozen=True)
class Wanted:
    """Row `index` of a lane of a stream. A lane's rows are asked for in ascending order, perhaps with gaps."""

    stream: int
    lane: int
    index: int


class Lanes:
    """The lanes of all streams, read by `num_workers` processes, or by this one when a row is taken (0).

    `cursors` int64 [num_streams, num_lanes, 6] says where each lane goes on. For one thread at a time.
    """

    def __init__(self, specs: Sequence[StreamSpec], cursors: NDArray[np.int64], *, num_workers: int, rank: int) -> None:
        self._cursors = cursors.copy()
        num_lanes = cursors.shape[1]
        self._here = _Reader(specs, num_lanes)
        self._workers = [_Worker(specs, num_lanes, rank) for _ in range(num_workers)]

    def ask(self, wanted: Wanted) -> None:
        """Have a row made; `take` must follow, in the order of asking."""
        if self._workers:
            self._worker_of(wanted).ask(wanted, self._cursors)

    def take(self, wanted: Wanted) -> tuple[Row, NDArray[np.int64]]:
        """The row asked for, and its lane's cursor after it. DataError: as reading raises, or workers keep dying."""
        place = (wanted.stream, wanted.lane)
        if self._workers:
            row, cursor = self._worker_of(wanted).take(wanted, self._cursors)
        else:
            row, cursor = self._here.read(wanted, self._cursors[place])
        self._cursors[place] = cursor
        return row, self._cursors[place].copy()

    def documents(self, wanted: Wanted) -> list[str]:
        """Where the row taken last from this lane comes from. Only without workers."""
        return self._here.lanes[wanted.stream, wanted.lane].documents

    def _worker_of(self, wanted: Wanted) -> _Worker:
        return self._workers[(wanted.lane + wanted.stream) % len(self._workers)]

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Reader:
    """Lanes as one process reads them; each is opened when it is first needed."""

    def __init__(self, specs: Sequence[StreamSpec], num_lanes: int) -> None:
        self._specs = specs
        self._num_lanes = num_lanes
        self._encoders: dict[int, Encoder] = {}
        self.lanes: dict[tuple[int, int], Lane] = {}

    def read(self, wanted: Wanted, cursor: Sequence[int] | NDArray[np.int64]) -> tuple[Row, tuple[int, ...]]:
        """The row and the cursor after it. `cursor` is where the lane goes on if it is not open yet."""
        key = (wanted.stream, wanted.lane)
        lane = self.lanes.get(key)
        if lane is None:
            at = Cursor(*(int(number) for number in cursor))
            spec = self._specs[wanted.stream]
            if wanted.stream not in self._encoders:
                self._encoders[wanted.stream] = spec.encoder.build()
            encoder = self._encoders[wanted.stream]
            lane = self.lanes[key] = Lane(spec, encoder, lane=wanted.lane, num_lanes=self._num_lanes, cursor=at)
        while lane.cursor.samples < wanted.index:  # another rank has these
            lane.next()
        return lane.next(), dataclasses.astuple(lane.cursor)


class _Worker:
    """One process and what it has been asked for."""

    def __init__(self, specs: Sequence[StreamSpec], num_lanes: int, rank: int) -> None:
        self._arguments = (specs, num_lanes, rank)
        self._asked: deque[Wanted] = deque()
        self._num_deaths = 0
        self._start()

    def _start(self) -> None:
        # Not forked: this process has threads of torch and NCCL, whose locks a fork would copy as they are.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._opened: set[tuple[int, int]] = set()
        self._num_sent = 0

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, wanted: Wanted, cursors: NDArray[np.int64]) -> None:
        self._asked.append(wanted)
        self._send(cursors)

    def _send(self, cursors: NDArray[np.int64]) -> None:
        """Send what was asked for, as far as the worker should know of it by now."""
        with contextlib.suppress(OSError):  # it died; `take` finds out and starts another
            while self._num_sent < min(len(self._asked), _MAX_UNDER_WAY):
                wanted = self._asked[self._num_sent]
                lane = (wanted.stream, wanted.lane)
                self._connection.send((wanted, None if lane in self._opened else tuple(cursors[lane].tolist())))
                self._opened.add(lane)
                self._num_sent += 1

    def take(self, wanted: Wanted, cursors: NDArray[np.int64]) -> tuple[Row, tuple[int, ...]]:
        assert self._asked and self._asked[0] == wanted, (wanted, self._asked)
        while True:
            try:
                answer = self._connection.recv()
                break
            except (EOFError, OSError):
                self._replace(cursors)
        if isinstance(answer, Exception):
            raise answer
        self._asked.popleft()
        self._num_sent -= 1
        self._send(cursors)
        return answer  # type: ignore[no-any-return]

    def _replace(self, cursors: NDArray[np.int64]) -> None:
        """Start another process, which goes on where the rows taken so far end."""
        self._process.join(_STOP_SECONDS)
        self._num_deaths += 1
        found = f"a loader worker ended with exit code {self._process.exitcode}"
        if self._num_deaths > MAX_DEATHS:
            raise DataError(
                f"{found}, which is its death number {self._num_deaths}; expected it to live as long as the training. "
                f"Exit code -9 is mostly a lack of memory: lower --num_workers or --shuffle_window",
                shared_by_all_ranks=False,
            )
        logger.warning(f"{found}; another one goes on in its place, no sample is lost or repeated")
        self._connection.close()
        self._start()
        self._send(cursors)

    def close(self) -> None:
        self._connection.close()  # which ends it
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(connection: Connection, specs: Sequence[StreamSpec], num_lanes: int, rank: int) -> None:
    """A worker's life: read what is asked for until nobody asks any more."""
    # Launchers signal whole process groups. The trainer decides when to stop, and needs rows until then.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    setup_logging(rank=rank)
    reader = _Reader(specs, num_lanes)
    with contextlib.suppress(EOFError, OSError):  # the trainer is gone
        while True:
            wanted, cursor = connection.recv()
            answer: Any
            try:
                answer = reader.read(wanted, cursor)
            except Exception as error:  # told to the trainer, who raises it
                answer = error
            connection.send(answer)
