"""What is done to each start of a campaign, drawn before it begins. Equal seeds give equal plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults import kinds


@dataclass(frozen=True)
class Moment:
    """So many seconds after the processes were started, or so many steps (and seconds) after this start's first."""

    seconds: float
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" + ("" if self.steps is None else f" after {self.steps} steps")


@dataclass(frozen=True)
class Plan:
    """One start and what is done to it: beside the training, at its end, and before the next start."""

    number: int
    keep_launchers: bool = False
    disturbances: tuple[tuple[Moment, str], ...] = ()
    ending: tuple[Moment, str] | None = None
    damages: tuple[str, ...] = ()


class Deck:
    """Deals all cards once, in a random order, before any comes again."""

    def __init__(self, cards: Sequence[str]):
        self._cards = tuple(cards)
        self._left: list[str] = []

    def deal(self, draw: random.Random) -> str:
        if not self._left:
            self._left = list(self._cards)
            draw.shuffle(self._left)
        return self._left.pop()


class Planner:
    def __init__(self, seed: int):
        self._seed = seed
        self._number = 0
        self._endings = Deck(kinds.ENDINGS)
        self._disturbances = Deck(kinds.DISTURBANCES)
        self._damages = Deck((*kinds.DAMAGES, *kinds.DAMAGES_AT_START))

    def draw(self, number: int, purpose: str) -> random.Random:
        return random.Random(f"{self._seed}/{number}/{purpose}")

    def next(self, *, is_quiet: bool) -> Plan:
        self._number += 1
        if is_quiet:
            return Plan(self._number)
        draw = self.draw(self._number, "plan")
        disturbances = [(_moment(draw, 8), self._disturbances.deal(draw)) for _ in range(draw.choice((0, 1, 1, 2)))]
        disturbances.sort(key=lambda one: (one[0].steps or -1, one[0].seconds))
        return Plan(
            self._number,
            keep_launchers=draw.random() < 0.5,
            disturbances=tuple(disturbances),
            ending=(_moment(draw, 14), self._endings.deal(draw)),
            damages=tuple(self._damages.deal(draw) for _ in range(draw.choice((0, 0, 1, 1, 2, 5)))),
        )


def _moment(draw: random.Random, most_steps: int) -> Moment:
    """A quarter come while the processes start, restore and get ready."""
    if draw.random() < 0.25:
        return Moment(draw.uniform(0, 7))
    return Moment(draw.uniform(0, 0.08), draw.randint(0, most_steps))
