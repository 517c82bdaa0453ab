"""The nodes of a job: which ranks share a node's memory, and the agent that answers for each node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed.env import Surroundings
from .agent_client import AgentAddress, ensure_agent
from .memory_files import node_id
from .peers import Peers
from .ring import interface_address, own_address


@dataclass(frozen=True)
class Nodes:
    """`own` is this rank's node; `ranks[n]` are the ranks of node n; `agents` is empty on a job of one node."""

    own: int
    is_leader: bool
    ranks: Sequence[Sequence[int]]
    domains: Sequence[str]
    agents: Sequence[AgentAddress]

    @property
    def num_nodes(self) -> int:
        return len(self.ranks)


def join_nodes(peers: Peers, memory_root: Path, *, disk_root: Path | None, around: Surroundings) -> Nodes:
    """Find out which ranks share a node, and on more than one node start the agents. Collective.

    Raises StorageError when an agent does not come up.
    """
    ids = peers.together(lambda: node_id(memory_root))
    order = list(dict.fromkeys(ids))
    ranks = [[rank for rank, one in enumerate(ids) if one == node] for node in order]
    own = order.index(ids[peers.rank])
    is_leader = ranks[own][0] == peers.rank
    domains_by_rank = peers.together(lambda: around.domain)
    domains = [domains_by_rank[members[0]] for members in ranks]
    if len(order) == 1:
        return Nodes(own, is_leader, ranks, domains, ())
    # Rank 0's own name may mean 127.0.0.1 on its own node, so that node looks for the way to another one.
    seen = peers.together(lambda: _address(around.main_host, around.interface) if own else "")
    host = seen[peers.rank] or _address(seen[ranks[1][0]], around.interface)

    def start_agent() -> AgentAddress | None:
        if not is_leader:
            return None
        return ensure_agent(memory_root, disk_root=disk_root, host=host, watch_pid=around.launcher_pid)

    started = peers.together(start_agent)
    agents = [agent for members in ranks if (agent := started[members[0]]) is not None]
    return Nodes(own, is_leader, ranks, domains, agents)


def _address(towards: str, interface: str | None) -> str:
    return interface_address(interface) if interface else own_address(towards)
