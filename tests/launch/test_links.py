"""Supervisors of several nodes: they find each other, pass on what they hear, and notice who is lost."""

import dataclasses
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from tests.nodes import Node, cluster, nodes_available

from hypershard.errors import HypershardError
from hypershard.launch.hosts import Stopped, Wait, address_of
from hypershard.launch.links import Links, Note, open_links
from hypershard.launch.surroundings import NodePlace

PORTS = iter(range(23000, 24000, 10))


def wait(seconds: float = 30.0, *, is_stopped: bool = False) -> Wait:
    return Wait(seconds, is_stopped=lambda: is_stopped)


def places(num_nodes: int) -> list[NodePlace]:
    place = NodePlace(num_nodes=num_nodes, port=next(PORTS), job="job")
    return [dataclasses.replace(place, node_rank=rank, host=f"host-{rank}") for rank in range(num_nodes)]


def connect(num_nodes: int) -> list[Links]:
    found: dict[int, Links] = {}

    def join(place: NodePlace) -> None:
        found[place.node_rank] = open_links(place, wait=wait())

    # The others come first: node 0 is waited for.
    threads = [threading.Thread(target=join, args=[place]) for place in reversed(places(num_nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [found[rank] for rank in range(num_nodes)]


def heard(links: Links, seconds: float = 10.0) -> list[Note]:
    ready, _, _ = select.select(links.sockets(), [], [], seconds)
    return [note for one in ready for note in links.read(one)]


def test_what_one_node_tells_all_others_hear() -> None:
    nodes = connect(3)
    assert [links.interface() for links in nodes] == ["lo"] * 3
    nodes[1].tell("stop", "SIGTERM")
    expected = [Note(node=1, host="host-1", kind="stop", text="SIGTERM")]
    assert heard(nodes[0]) == expected and heard(nodes[2]) == expected
    nodes[2].tell("ended", "out of memory", code=1)
    nodes[2].close()
    expected = [Note(node=2, host="host-2", kind="ended", text="out of memory", code=1)]
    assert heard(nodes[0]) == expected and heard(nodes[1]) == expected
    assert heard(nodes[0]) == [], "a node that has said that it ends is not lost"
    nodes[1].close()
    assert [(note.kind, note.node) for note in heard(nodes[0])] == [("lost", 1)]
    nodes[0].close()


def test_nodes_that_do_not_come_are_named() -> None:
    first, second = places(2)
    with pytest.raises(HypershardError, match=r"node 1 of 2 did not come within 1s to 127\.0\.0\.1"):
        open_links(first, wait=wait(1.0))
    with pytest.raises(HypershardError, match=r"node 0 .* did not answer within 1s"):
        open_links(second, wait=wait(1.0))
    with pytest.raises(Stopped):
        open_links(first, wait=wait(is_stopped=True))


def test_a_node_of_another_job_is_turned_away() -> None:
    first, second = places(2)
    stranger = dataclasses.replace(second, job="another")
    refused: list[HypershardError] = []

    def join() -> None:
        try:
            open_links(stranger, wait=wait(2.0))
        except HypershardError as error:
            refused.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    with pytest.raises(HypershardError, match="node 1 of 2 did not come"):
        open_links(first, wait=wait(2.0))
    thread.join(timeout=30)
    assert "did not answer" in str(refused[0])


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(HypershardError, match=r"host nobody.invalid: no address after 1s"):
        address_of("nobody.invalid", wait=wait(1.0))
    assert address_of("localhost", wait=wait()) == "127.0.0.1"


reason = nodes_available()
needs_nodes = pytest.mark.skipif(reason is not None, reason=reason or "")


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with cluster(2) as made:
        yield made


def listen(node: Node, main: Node) -> "subprocess.Popen[str]":
    """A program on `node` that connects, then prints what it hears."""
    place = {"node_rank": node.number, "num_nodes": 2, "host": node.address, "main_host": main.address}
    words = [sys.executable, "-m", "tests.launch.listener", json.dumps(place)]
    return node.start(words, stdout=subprocess.PIPE, text=True)


@needs_nodes
def test_a_silent_node_is_lost_after_a_stated_time(nodes: list[Node]) -> None:
    programs = [listen(node, nodes[0]) for node in nodes]
    for program in programs:
        assert program.stdout is not None and program.stdout.readline() == "connected\n"
    nodes[1].cut_off()
    since = time.monotonic()
    for program, other in zip(programs, reversed(nodes), strict=True):
        said, _ = program.communicate(timeout=60)
        assert said.startswith(f"lost {other.address}: "), said
    assert time.monotonic() - since > 1, "nothing told them but the silence"
