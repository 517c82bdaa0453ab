"""A quick proof that ranks can talk: an all-reduce inside each node, then over all of them, timed and checked.

    python -m hypershard.distributed.health --output FILE …      one process per rank, as torchrun or srun sets them

First each node alone, so that a fault inside a node is that node's. Then all nodes vote on rank 0's store: one that is
ill says so instead of letting the others wait for it, and one that never comes is named. Only when all are well they do
the all-reduce over the network. Each rank writes what it saw to its own file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .env import Ranks, read_ranks

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

_MEASURED_SECONDS = 2.0  # of all-reduces; fewer rounds where the network is slow
_MOST_ROUNDS = 10
_WAITING_SHARE = 0.6  # of the time left, for other nodes to come


@dataclass(frozen=True)
class AllReduce:
    """What an all-reduce of `num_bytes` per rank took. `gb_per_second` is bus bandwidth, as nccl-tests define it."""

    num_ranks: int
    num_bytes: int
    seconds: float
    gb_per_second: float
    is_right: bool


@dataclass(frozen=True)
class Task:
    """What to measure on which device, until when (on this process's monotonic clock)."""

    device: torch.device
    num_bytes: int
    deadline: float


@dataclass(frozen=True)
class Seen:
    """What one rank saw. `node` and `world` are None where that all-reduce was not done.

    `ill`: node number -> "host: what it says of itself". `absent`: numbers of nodes that did not come in time.
    """

    rank: int
    host: str
    backend: str
    node: AllReduce | None = None
    world: AllReduce | None = None
    ill: dict[int, str] = field(default_factory=dict)
    absent: tuple[int, ...] = ()
    error: str = ""


def measure_all_reduce(device: torch.device, *, num_bytes: int) -> AllReduce:
    """Time float32 all-reduces of `num_bytes` on the default group, after one that is checked element by element.

    All ranks of the group call it. Fewer rounds on a slow network: some two seconds in all, or one round.
    """
    import torch
    import torch.distributed as dist

    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    # Small whole numbers, whose sum float32 holds exactly in any order.
    data = torch.full((num_bytes // 4,), float(rank + 1), device=device)
    dist.all_reduce(data)
    is_right = bool((data == num_ranks * (num_ranks + 1) / 2).all())
    data.zero_()
    first = _timed(data, 1)
    rounds = torch.tensor([int(min(_MOST_ROUNDS, max(1.0, _MEASURED_SECONDS / first)))], device=device)
    dist.broadcast(rounds, 0)  # ranks measure different times, and must do as many
    seconds = _timed(data, int(rounds.item()))
    # The slowest rank's time is what a step waits for; wrong anywhere is wrong.
    shared = torch.tensor([seconds, 0.0 if is_right else 1.0], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    seconds = float(shared[0])
    factor = 2 * (num_ranks - 1) / num_ranks
    return AllReduce(num_ranks, num_bytes, seconds, factor * num_bytes / seconds / 1e9, not bool(shared[1]))


def _timed(data: torch.Tensor, num_rounds: int) -> float:
    """Seconds of one round."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if data.is_cuda:
            torch.cuda.synchronize(data.device)

    wait()
    started = time.perf_counter()
    for _ in range(num_rounds):
        dist.all_reduce(data)
    wait()
    return (time.perf_counter() - started) / num_rounds


def look(ranks: Ranks, *, node_port: int, num_bytes: int | None, trouble: str, deadline: float) -> Seen:
    """One rank's part, over at `deadline` (monotonic clock). `trouble`: what ails this node, "" when it is well.

    `node_port`: a free port of this node. `num_bytes` None: 1 GiB on GPUs, 16 MiB on the host. Never raises for what
    goes wrong between ranks: that is the answer.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    seen = Seen(ranks.rank, socket.gethostname(), "nccl" if on_gpu else "gloo")
    task = Task(device, num_bytes or (2**30 if on_gpu else 2**24), deadline)
    if not trouble:
        if on_gpu:
            torch.cuda.set_device(device)
        here = Ranks(ranks.local_rank, ranks.local_world_size, master_addr="127.0.0.1", master_port=node_port)
        seen = _measured(seen, "node", here, task)
        trouble = seen.error or ("" if seen.node is None or seen.node.is_right else "the sum over its GPUs is wrong")
    if ranks.world_size == ranks.local_world_size:
        return seen
    # A part of the time is kept for the all-reduce itself, and to say who did not come.
    wait_until = time.monotonic() + _WAITING_SHARE * (deadline - time.monotonic())
    try:
        store = _store(ranks, wait_until)
        seen = _voted(seen, ranks, store, trouble, wait_until)
    except (RuntimeError, OSError, ValueError) as error:
        what = f"node 0 at {ranks.master_addr}:{ranks.master_port} cannot be reached: {_first_line(error)}"
        return dataclasses.replace(seen, absent=(0,), error=seen.error or what)
    if not (seen.ill or seen.absent or trouble):
        seen = _measured(seen, "world", ranks, task, store)
    _leave(ranks, store, ranks.world_size // ranks.local_world_size - len(seen.absent), deadline)
    return seen


def _measured(seen: Seen, what: Literal["node", "world"], ranks: Ranks, task: Task, store: Store | None = None) -> Seen:
    import torch.distributed as dist

    try:
        dist.init_process_group(
            seen.backend,
            init_method=None if store else f"tcp://{ranks.master_addr}:{ranks.master_port}",
            store=dist.PrefixStore("all", store) if store else None,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=_left(task.deadline),
            device_id=task.device if task.device.type == "cuda" else None,
        )
        result = measure_all_reduce(task.device, num_bytes=task.num_bytes)
        dist.destroy_process_group()
    except (RuntimeError, OSError, ValueError) as error:
        inside = "inside the node" if what == "node" else "over all nodes"
        return dataclasses.replace(seen, error=f"the all-reduce {inside} failed: {_first_line(error)}")
    return dataclasses.replace(seen, node=result) if what == "node" else dataclasses.replace(seen, world=result)


def _store(ranks: Ranks, wait_until: float) -> Store:
    from torch.distributed import TCPStore

    if not ranks.is_main:
        _await_port(ranks.master_addr, ranks.master_port, wait_until)
    return TCPStore(
        ranks.master_addr,
        ranks.master_port,
        is_master=ranks.is_main,
        timeout=_left(wait_until),
        wait_for_workers=False,  # who comes and who does not is the question
    )


def _await_port(host: str, port: int, wait_until: float) -> None:
    """Return when somebody listens there; raises OSError after `wait_until`. TCPStore takes up to thrice its limit."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.05, wait_until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= wait_until:
                raise
            time.sleep(0.2)


def _voted(seen: Seen, ranks: Ranks, store: Store, trouble: str, wait_until: float) -> Seen:
    """Say how this node is, and hear how the others are. The first rank of a node speaks for it."""
    node, num_nodes = ranks.rank // ranks.local_world_size, ranks.world_size // ranks.local_world_size
    if ranks.local_rank == 0:
        store.set(f"vote/{node}", f"{seen.host}: {trouble}" if trouble else "")
    ill, absent = {}, []
    for number in range(num_nodes):
        try:
            store.wait([f"vote/{number}"], _left(wait_until))
        except RuntimeError:  # includes DistStoreError
            absent.append(number)
            continue
        said = store.get(f"vote/{number}").decode()
        if said:
            ill[number] = said
    return dataclasses.replace(seen, ill=ill, absent=tuple(absent))


def _leave(ranks: Ranks, store: Store, num_nodes: int, deadline: float) -> None:
    """Rank 0 serves the store, so it leaves last: when the first rank of each node that came has said it is done."""
    with contextlib.suppress(RuntimeError, OSError):
        if ranks.local_rank == 0:
            store.add("done", 1)
        while ranks.is_main and store.add("done", 0) < num_nodes and time.monotonic() < deadline:
            time.sleep(0.05)


def _left(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.05, deadline - time.monotonic()))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hypershard.distributed.health", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--node_port", type=int, required=True)
    parser.add_argument("--num_bytes", type=int)
    parser.add_argument("--trouble", default="")
    parser.add_argument("--ends_at", type=float, required=True, help="in seconds since 1970")
    args = parser.parse_args(argv)
    limit_seconds = max(1.0, args.ends_at - time.time())
    # Whatever hangs below, in a driver or a library: the kernel ends this process.
    signal.alarm(int(limit_seconds) + 10)
    seen = look(
        read_ranks(),
        node_port=args.node_port,
        num_bytes=args.num_bytes,
        trouble=args.trouble,
        deadline=time.monotonic() + limit_seconds,
    )
    args.output.write_text(json.dumps(dataclasses.asdict(seen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
