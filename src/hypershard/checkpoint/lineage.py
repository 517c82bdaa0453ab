"""Timelines of one run. A resume from an older checkpoint begins a new one and abandons what came after that.

Equal step numbers do not mean equal histories: a blob of step 60 that a lost node brings back must never be joined
with another rank's step 60 of the timeline that replaced it. So everything saved carries its lineage, and only
parts of one lineage make a checkpoint.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Lineage:
    """`generation` counts the starts of a run; `id` tells apart two starts that knew nothing of each other."""

    generation: int
    id: str


NO_LINEAGE = Lineage(0, "")
# Of what cannot be read: looked at first, so that it is named and passed over instead of being overlooked.
UNREADABLE = Lineage(sys.maxsize, "")


_ROOM = 1000  # starts that nobody saw who could not ask every tier


def next_lineage(seen: Iterable[Lineage], *, is_sure: bool = True) -> Lineage:
    """A new timeline, later than all that were `seen`, and unless `is_sure` than those that a silent tier may hold."""
    return Lineage(
        (1 if is_sure else _ROOM) + max((one.generation for one in seen if one != UNREADABLE), default=0),
        secrets.token_hex(8),
    )
