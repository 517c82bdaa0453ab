"""How fast an all-reduce is on a healthy cluster: measured rows in bus_bandwidth.json. Imports no torch."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class BusBandwidth:
    """An all-reduce somebody measured, in 10^9 bytes a second; `message_gib` None: its source does not say."""

    instance: str
    num_nodes: int
    gb_per_second: float
    message_gib: float | None
    source: str
    date: str  # year-month, of the measurement or of the day its source was read


@functools.cache
def bus_bandwidths() -> tuple[BusBandwidth, ...]:
    """Every row of the catalog."""
    rows = json.loads((Path(__file__).parent / "bus_bandwidth.json").read_text())["measured"]
    return tuple(BusBandwidth(**row) for row in rows)


def bus_bandwidth(instance_name: str, num_nodes: int) -> BusBandwidth | None:
    """The row for so many nodes of a type: the one of most nodes that are not more. None: nobody has measured it.

    One node talks through NVSwitch, several through the network: a row of one node never stands for several.
    """
    rows = [
        row
        for row in bus_bandwidths()
        if row.instance == instance_name and row.num_nodes <= num_nodes and (row.num_nodes == 1) == (num_nodes == 1)
    ]
    return max(rows, key=lambda row: row.num_nodes, default=None)
