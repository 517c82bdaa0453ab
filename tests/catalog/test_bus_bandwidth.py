"""Rows of measured all-reduces belong to types of the catalog, and the right one is found."""

from __future__ import annotations

from hypershard.catalog.bus_bandwidth import bus_bandwidth, bus_bandwidths
from hypershard.catalog.instances import instances


def test_every_row_is_of_a_known_type_and_possible() -> None:
    by_name = {row.name: row for row in instances()}
    assert len(bus_bandwidths()) > 10
    for row in bus_bandwidths():
        links = by_name[row.instance].interconnect
        assert links is not None
        # In one node an all-reduce in the switch (NVLS) goes beyond the links' rate, by less than a tenth.
        assert 0 < row.gb_per_second < 1.1 * links.gb_per_second, row
        assert row.source
        assert row.date


def test_the_row_of_most_nodes_that_are_not_more() -> None:
    found = [bus_bandwidth("p4d.24xlarge", num_nodes) for num_nodes in (1, 2, 3, 4, 64)]
    assert [row.num_nodes for row in found if row] == [1, 2, 3, 4, 4]


def test_what_nobody_measured_is_unknown() -> None:
    assert bus_bandwidth("g5.48xlarge", 2) is None
    # Only measured over several nodes; NVSwitch alone is another thing.
    assert bus_bandwidth("p6-b300.48xlarge", 1) is None
