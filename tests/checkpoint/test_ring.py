import socket
from collections import Counter

import pytest

from hypershard.checkpoint.ring import copy_nodes, interface_address, own_address
from hypershard.errors import StorageError


def kept(domains: list[str], copies: int) -> Counter[int]:
    """How many copies each node keeps."""
    return Counter(keeper for node in range(len(domains)) for keeper in copy_nodes(domains, node, copies))


def num_apart(domains: list[str]) -> int:
    """Nodes whose first copy is in another domain, as far as is known."""
    return sum(not domain or domains[copy_nodes(domains, node, 1)[0]] != domain for node, domain in enumerate(domains))


def test_without_domains_it_is_the_next_nodes() -> None:
    assert [copy_nodes([""] * 4, node, 1) for node in range(4)] == [[1], [2], [3], [0]]
    assert copy_nodes([""] * 5, 3, 2) == [4, 0]
    assert [copy_nodes(["rack"] * 3, node, 1) for node in range(3)] == [[1], [2], [0]]


def test_fewer_nodes_than_copies() -> None:
    assert copy_nodes([""], 0, 2) == []
    assert copy_nodes(["", ""], 0, 3) == [1]
    assert sorted(copy_nodes(["a", "a", "b"], 1, 9)) == [0, 2]
    assert copy_nodes([""] * 3, 0, 0) == []


@pytest.mark.parametrize(
    "domains",
    [
        ["a", "a", "b", "b"],
        ["a", "b", "a", "b", "c", "c"],
        ["a", "a", "b", "b", "c"],
        ["a"] * 4 + ["b"] * 4,
        ["a", "", "", "a", "b", ""],
        [f"rack {n // 8}" for n in range(64)],
    ],
)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_leave_their_domain_and_are_spread_evenly(domains: list[str], copies: int) -> None:
    for node in range(len(domains)):
        found = copy_nodes(domains, node, copies)
        assert len(set(found)) == len(found) == min(copies, len(domains) - 1)
        assert node not in found
    assert set(kept(domains, copies).values()) == {min(copies, len(domains) - 1)}
    assert num_apart(domains) == len(domains)


def test_where_one_domain_is_most_of_the_job_as_many_leave_as_can() -> None:
    assert num_apart(["a", "a", "a", "b"]) == 2
    assert num_apart(["a", "b", "a", "a", "a", "b", "a"]) == 4


def test_addresses() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") in ("127.0.0.1", "::1")
    assert interface_address("lo") == "127.0.0.1"
    assert interface_address("nosuch0, lo") == "127.0.0.1"
    with pytest.raises(StorageError, match="no way to nosuch"):
        own_address("nosuch.invalid")
    names = [name for _, name in socket.if_nameindex()]
    with pytest.raises(StorageError, match=f"'nosuch0'.*{names[0]}.*GLOO_SOCKET_IFNAME"):
        interface_address("nosuch0")
