"""What tests have done on a node: `python -m tests.checkpoint.node_tasks <task> <arguments as JSON>`."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.checkpoint.agents import ROOM_BYTES, make_blob, start_agent
from tests.nodes import Node

from hypershard.checkpoint.agent_client import AgentAddress, AgentClient, AgentSource, ensure_agent
from hypershard.checkpoint.blob import HEAD_BYTES, blob_damage, read_table
from hypershard.checkpoint.memory_files import job_root, scan
from hypershard.checkpoint.ring import own_address
from hypershard.checkpoint.sums import FileSource
from hypershard.errors import StorageError

REPOSITORY = Path(__file__).parents[2]
ROOT = "/dev/shm"
FIRST_PROCESS = 1  # of a node: agents that watch it live as long as the node


def on(node: Node, task: str, **arguments: Any) -> Any:
    """Do a task on a node and return its answer."""
    return json.loads(node.run(command(task, **arguments)).stdout)


def command(task: str, **arguments: Any) -> list[str]:
    return ["env", f"--chdir={REPOSITORY}", sys.executable, "-m", __spec__.name, task, json.dumps(arguments)]


def ensure(towards: str) -> dict[str, Any]:
    """This node's agent, on the address by which `towards` is reached."""
    root = job_root(Path(ROOT), "job")
    return asdict(ensure_agent(root, disk_root=None, host=own_address(towards), watch_pid=FIRST_PROCESS))


def hasty(host: str) -> dict[str, Any]:
    """An agent that waits 1.2 seconds for a byte."""
    root = job_root(Path(ROOT), "job")
    return asdict(start_agent(root, watch_pid=FIRST_PROCESS, host=host, timeout_seconds=1.2))


def save(
    rank: int, steps: list[int], agent: dict[str, Any], target: dict[str, Any], payload_bytes: int = 2**20
) -> list[str | None]:
    """Rank `rank` of this node saves these steps, each with a copy at `target`; what went wrong with each copy."""
    AgentClient(AgentAddress(**target)).reserve({rank: payload_bytes + ROOM_BYTES})
    root, client, outcomes = job_root(Path(ROOT), "job"), AgentClient(AgentAddress(**agent)), []
    for step in steps:
        path = make_blob(root, rank=rank, step=step, payload_bytes=payload_bytes)
        outcomes += client.replicate(path, [AgentAddress(**target)])
    return outcomes


def held() -> list[tuple[int, int, str | None]]:
    """Rank, step and damage of all blobs in this node's memory."""
    found = scan(job_root(Path(ROOT), "job"))
    return sorted((table.rank, table.step, blob_damage(FileSource(path), table)) for path, table in found)


def own_digest(rank: int) -> str:
    """Of the payload that rank `rank` of this node saved."""
    source = FileSource(job_root(Path(ROOT), "job") / f"own/rank-{rank:05d}/slot-0")
    table = read_table(source)
    assert table is not None
    return hashlib.sha256(source.read(HEAD_BYTES, table.size_bytes)).hexdigest()


def read(agent: dict[str, Any], rank: int) -> dict[int, Any]:
    """By step, the digest of what the agent of another node has of rank `rank`, or why it cannot be read."""
    found: dict[int, Any] = {}
    address = AgentAddress(**agent)
    for path, _ in AgentClient(address).held("memory"):
        source = AgentSource(address, "memory", path)
        table = read_table(source)
        if table is not None and table.rank == rank:
            assert blob_damage(source, table) is None
            found[table.step] = hashlib.sha256(source.read(HEAD_BYTES, table.size_bytes)).hexdigest()
    return found


def ping(agent: dict[str, Any], timeout_seconds: float = 5) -> str:
    try:
        return str(AgentClient(AgentAddress(**agent), timeout_seconds=timeout_seconds).ping()["host"])
    except StorageError as error:
        return str(error)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
