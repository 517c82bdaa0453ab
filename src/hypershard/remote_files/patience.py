"""How long a request is made again, and the one loop that does so."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import StorageError
from ..log import logger
from ..units import format_seconds

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """With the defaults a server that is not there costs about a minute, one that never answers three.

    A server that answers that it is too busy, and a hub does so for minutes to many ranks at once, is asked again
    for a quarter of an hour.
    """

    connect_seconds: float = 5.0
    read_seconds: float = 20.0  # without a byte of the answer
    num_attempts: int = 8  # that end without an answer
    first_wait_seconds: float = 0.5  # doubles with each attempt; the actual wait is random between half of this and all
    longest_wait_seconds: float = 20.0
    total_seconds: float = 900.0


class Unreachable(StorageError):
    """A place that does not answer, or is too busy, for as long as we are patient."""


class Passing(Exception):
    """A failure that the same request may not meet again.

    `wait_seconds`: for how long the server asks to be left alone. `busy`: it answered, so only the time is limited.
    """

    def __init__(self, cause: str, *, wait_seconds: float = 0.0, busy: bool = False) -> None:
        super().__init__(cause)
        self.wait_seconds, self.busy = wait_seconds, busy


def insist(doing: str, request: Callable[[], T], patience: Patience) -> T:
    """The answer to `request`, made again while it raises Passing; in the end Unreachable, with the last cause."""
    started_at = time.monotonic()
    num_tries = num_unanswered = 0
    while True:
        try:
            return request()
        except Passing as error:
            num_tries += 1
            num_unanswered += not error.busy
            step = min(patience.first_wait_seconds * 2 ** (num_tries - 1), patience.longest_wait_seconds)
            # A random wait keeps many ranks that failed together from coming back together.
            seconds = error.wait_seconds + random.uniform(step / 2, step)
            passed = time.monotonic() - started_at
            if num_unanswered >= patience.num_attempts or passed + seconds > patience.total_seconds:
                message = f"{doing}: {error}; gave up after {num_tries} attempts in {format_seconds(passed)}"
                raise Unreachable(message, shared_by_all_ranks=False) from error
            logger.warning("%s: %s; trying again in %.1f s", doing, error, seconds)
        time.sleep(seconds)
