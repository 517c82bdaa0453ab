"""Agents on nodes with networks and memories of their own, and what is left when a node is lost."""

import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.checkpoint.agents import wait_for
from tests.checkpoint.node_tasks import command, on
from tests.nodes import Node, cluster, nodes_available

from hypershard.checkpoint.ring import copy_nodes

reason = nodes_available()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

BIG_BYTES = 2**23
AGENT = "hypershard.checkpoint.agent"
LISTENING = "0A"  # of /proc/net/tcp


@pytest.fixture
def two() -> Iterator[list[Node]]:
    with cluster(2) as nodes:
        yield nodes


def listeners(node: Node) -> set[str]:
    """Addresses on which anything on the node listens."""
    lines = node.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout.splitlines()
    fields = [line.split() for line in lines if ":" in line.split()[1]]
    return {
        socket.inet_ntoa(struct.pack("<I", int(field[1].split(":")[0], 16))) if len(field[1]) < 20 else "IPv6"
        for field in fields
        if field[3] == LISTENING
    }


def slots_begun(node: Node) -> list[Path]:
    """Copy slots with something after their head, which itself is not there: a transfer under way or torn."""
    found = []
    for path in node.shm.glob("hypershard-*/job/copies/*/slot-*"):
        with open(path, "rb") as file:
            content = file.read(8192)
        if not any(content[:4096]) and any(content[4096:]):
            found.append(path)
    return found


def test_copies_go_round_the_ring_and_bring_back_a_lost_node() -> None:
    with cluster(3) as nodes:
        agents = [on(node, "ensure", towards=nodes[1 if node is nodes[0] else 0].address) for node in nodes]
        assert [agent["host"] for agent in agents] == [node.address for node in nodes]
        assert [listeners(node) for node in nodes] == [{node.address} for node in nodes]
        assert on(nodes[2], "ensure", towards=nodes[1].address) == agents[2]
        keepers = [copy_nodes([""] * 3, node, 1)[0] for node in range(3)]
        for rank, keeper in enumerate(keepers):
            saved = on(nodes[rank], "save", rank=rank, steps=[1, 2, 3], agent=agents[rank], target=agents[keeper])
            assert saved == [None] * 3
        expected = on(nodes[1], "own_digest", rank=1)

        nodes[1].lose()
        assert "did not move a byte" in on(nodes[0], "ping", agent=agents[1], timeout_seconds=1)
        nodes[1].come_back()
        assert on(nodes[1], "held") == []
        keeper = keepers[1]
        found = on(nodes[1], "read", agent=agents[keeper], rank=1)
        assert set(found) == {"2", "3"} and found["3"] == expected and found["2"] != expected
        new = on(nodes[1], "ensure", towards=nodes[0].address)
        assert new["token"] != agents[1]["token"]
        # The agents of the other nodes are the same ones, and send to the new one.
        assert on(nodes[0], "save", rank=0, steps=[4], agent=agents[0], target=new) == [None]
        assert on(nodes[1], "held") == [[0, 4, None]]


def begin_slow_save(
    nodes: list[Node], agents: list[dict[str, object]], *, takes_seconds: int = 1
) -> "subprocess.Popen[str]":
    """Node 0 has saved step 1 with a copy on node 1, and is now in the midst of sending step 2."""
    save = {"rank": 0, "agent": agents[0], "target": agents[1], "payload_bytes": BIG_BYTES}
    assert on(nodes[0], "save", steps=[1], **save) == [None]
    nodes[0].slow_down(BIG_BYTES // takes_seconds)
    words = command("save", steps=[2], **save)
    process = nodes[0].start(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: bool(slots_begun(nodes[1])))
    return process


def test_the_receiving_node_is_lost_during_a_transfer(two: list[Node]) -> None:
    agents = [on(node, "hasty", host=node.address) for node in two]
    save = begin_slow_save(two, agents, takes_seconds=10)
    two[1].lose()
    (said,) = json.loads(save.communicate(timeout=60)[0])
    assert two[1].address in said and "did not move a byte" in said
    assert on(two[0], "held") == [[0, 2, None]]


def test_the_sending_node_is_lost_during_a_transfer(two: list[Node]) -> None:
    agents = [on(node, "hasty", host=node.address) for node in two]
    with begin_slow_save(two, agents, takes_seconds=10) as save:
        two[0].lose()
        assert save.returncode == -9
    log = next(two[1].shm.glob("hypershard-*/job/agent.log"))
    wait_for(lambda: "step 2, was cut off: its sender did not move a byte" in log.read_text())
    assert len(slots_begun(two[1])) == 1
    assert on(two[1], "held") == [[0, 1, None]]
    two[0].come_back()
    assert list(on(two[0], "read", agent=agents[1], rank=0)) == ["1"]


def test_a_network_that_was_away_for_a_moment_costs_nothing(two: list[Node]) -> None:
    agents = [on(node, "ensure", towards=two[node is two[0]].address) for node in two]
    with begin_slow_save(two, agents) as save:
        two[1].cut_off()
        time.sleep(0.5)  # for packets to get lost
        two[1].reconnect()
        assert json.loads(save.communicate(timeout=60)[0]) == [None]
    assert on(two[1], "held") == [[0, 1, None], [0, 2, None]]


def test_trainers_and_agents_that_are_killed_lose_no_copy(two: list[Node]) -> None:
    agents = [on(node, "ensure", towards=two[node is two[0]].address) for node in two]
    with begin_slow_save(two, agents) as save:
        assert two[0].kill("node_tasks") >= 1  # the trainer; its agent has the blob and goes on
        assert save.wait() == -9
    wait_for(lambda: on(two[1], "held") == [[0, 1, None], [0, 2, None]])
    for node in two:
        assert node.kill(AGENT) == 1
        wait_for(lambda node=node: not node.processes())
    again = on(two[1], "ensure", towards=two[0].address)
    assert again == agents[1], "the first node reaches it as it reached the one before"
    assert set(on(two[0], "read", agent=again, rank=0)) == {"1", "2"}


def test_lost_nodes_leave_nothing_behind(two: list[Node]) -> None:
    on(two[0], "ensure", towards=two[1].address)
    pids = two[0].processes()
    assert any(AGENT in words for words in pids.values())
    two[0].lose()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids) and not two[0].processes()
    two[0].come_back()
    assert not list(two[0].shm.iterdir()) and two[0].processes() == {}
