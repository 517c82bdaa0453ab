"""Everything that goes wrong, by name, and how it is done. What is done is drawn from the generator that is given."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.job import Job, Launchers
from tests.faults.place import Site
from tests.faults.survivors import DISK, LOCAL, MEMORY, S3, TIERS, RunPlaces, blob_roots
from tests.s3_server import Fault, Rule

from hypershard.s3 import S3Uri

# End a start. A kind that stands twice comes twice as often.
ENDINGS = (
    "kill one rank",
    "kill one rank",
    "kill some ranks",
    "kill all ranks",
    "stop a rank, then kill it",
    "lose a node's memory",
    "lose a node",
    "lose the memory of all nodes",
    "lose memory and disks of all nodes",
    "SIGTERM",
)
# Happen beside the training, which must go on.
DISTURBANCES = (
    "kill an agent",
    "stop a rank",
    "stop an agent",
    "S3 answers 503",
    "S3 answers 500",
    "S3 resets connections",
    "S3 stalls",
    "S3 is slow",
    "S3 flips bits of uploads",
    "S3 flips bits of downloads",
    "S3 cuts bodies",
    "S3 says 200 with an error in it",
    "S3 is out",
    "the shared disk is full",
)
# Happen while nothing runs.
DAMAGES = tuple(
    f"{what} {tier}" for tier in TIERS for what in ("flip a byte in", "cut off a file in", "delete a file in")
)
DAMAGES_AT_START = ("a node's memory is full",)
ALL_KINDS = tuple(dict.fromkeys((*ENDINGS, *DISTURBANCES, *DAMAGES, *DAMAGES_AT_START)))

_OBJECTS = "/step-"  # in the path of a checkpoint's objects, and not in a listing's


@dataclass(frozen=True)
class Done:
    """A fault that was made: its kind and what was drawn for it."""

    kind: str
    details: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind} {self.details}" if self.details else self.kind


@dataclass(frozen=True)
class Loss:
    """What an ending took: memory and disks by node's number, and whether a node went with a cut network."""

    memory: frozenset[int] = frozenset()
    disks: frozenset[int] = frozenset()
    node: bool = False
    was_asked: bool = False  # SIGTERM: the run saves and says goodbye


@dataclass(frozen=True)
class Condition:
    """Something that stays broken until `ends_at` on the monotonic clock; `lift` mends it."""

    name: str
    ends_at: float
    lift: Callable[[], None]


# --- endings -------------------------------------------------------------------------------------------------


def end(kind: str, job: Job, launchers: Launchers, draw: random.Random) -> tuple[Done, Loss] | None:
    """Make a fault that ends the job; None when it came too late."""
    node = draw.randrange(job.num_nodes)
    if kind == "lose a node":
        return _lose_node(job, launchers, node, with_disk=draw.random() < 0.5)
    victims = _victims(kind, job, node, draw)
    if kind == "stop a rank, then kill it":
        if not job.send(victims, signal.SIGSTOP):
            return None
        time.sleep(draw.uniform(0.2, 2))
    if not job.send(victims, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL):
        return None
    if kind == "SIGTERM":
        return Done(kind, {}), Loss(was_asked=True)
    if not kind.startswith("lose"):
        return Done(kind, {"ranks": victims}), Loss()
    job.end_all()
    nodes = frozenset({node} if kind == "lose a node's memory" else range(len(job.site.nodes)))
    loss = Loss(memory=nodes, disks=nodes if "disks" in kind else frozenset())
    _lose(job, launchers, loss)
    return Done(kind, {"nodes": sorted(nodes)}), loss


def _victims(kind: str, job: Job, node: int, draw: random.Random) -> list[int]:
    ranks = list(range(job.world_size))
    if kind in ("kill one rank", "stop a rank, then kill it"):
        return [draw.choice(ranks)]
    if kind == "kill some ranks":
        return draw.sample(ranks, max(1, len(ranks) - 1))
    if kind == "lose a node's memory":
        return [rank for rank in ranks if job.node_of(rank) == node]
    return ranks


def _lose(job: Job, launchers: Launchers, loss: Loss) -> None:
    launchers.end(loss.memory)
    for node, pid in job.agent_pids().items():
        if node in loss.memory:
            _kill(pid)
    for node in loss.memory:
        job.site.clear_memory(node)
    for node in loss.disks:
        job.site.clear_disk(node)


def _lose_node(job: Job, launchers: Launchers, node: int, *, with_disk: bool) -> tuple[Done, Loss] | None:
    if not job.running():
        return None
    job.site.nodes[node].lose()
    job.lost_nodes.add(node)
    launchers.end([node])
    job.end()  # as a cluster does that sees a node go: the others cannot tell a cut network from a slow one
    job.site.replace_node(node, with_disk=with_disk)
    gone = frozenset({node})
    return Done("lose a node", {"node": node, "its disk": "kept" if with_disk else "lost"}), Loss(
        memory=gone, disks=frozenset() if with_disk else gone, node=True
    )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# --- disturbances --------------------------------------------------------------------------------------------


def disturb(kind: str, job: Job, draw: random.Random) -> tuple[Done, Condition | None] | None:
    """Make a fault that the training survives; None when there is nothing to be disturbed."""
    site, now = job.site, time.monotonic()
    if kind.startswith("S3"):
        rule, details = _s3_rules(kind, draw)
        longest = 30.0 if kind == "S3 is out" else 8.0
        seconds = draw.uniform(0.5, longest)
        site.break_bucket(rule)
        return Done(kind, {**details, "seconds": round(seconds, 1)}), Condition("s3", now + seconds, site.mend_bucket)
    if kind == "the shared disk is full":
        seconds = draw.uniform(0.2, 3)
        site.fill_shared_disk()
        return Done(kind, {"seconds": round(seconds, 1)}), Condition("disk", now + seconds, site.free_shared_disk)
    if kind == "stop a rank":
        rank = draw.randrange(job.world_size)
        if not job.send([rank], signal.SIGSTOP):
            return None
        pids = [job.rank_pids()[rank]]
        details = {"rank": rank}
    else:
        agents = job.agent_pids()
        if not agents:
            return None
        node = draw.choice(sorted(agents))
        pids, details = [agents[node]], {"node": node}
        if kind == "kill an agent":
            _kill(agents[node])
            return Done(kind, details), None
        _signal(agents[node], signal.SIGSTOP)
    seconds = draw.uniform(0.2, 3)

    def go_on() -> None:
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    return Done(kind, {**details, "seconds": round(seconds, 1)}), Condition("stopped", now + seconds, go_on)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _s3_rules(kind: str, draw: random.Random) -> tuple[Rule, dict[str, Any]]:
    times = draw.choice((1, 2, 3, None))  # of each request; None: all
    when = draw.choice(("before", "after", "middle"))
    method = draw.choice(("GET", "PUT", "POST", ""))
    speed = draw.choice((10_000, 100_000, 1_000_000))
    out = draw.choice((Fault(status=503), Fault(reset="before"), Fault(stall=True)))
    slow = Fault(bytes_per_second=speed, read_bytes_per_second=speed)
    flip_up, flip_down = Fault(flip_upload=True), Fault(flip_download=True)
    found: dict[str, tuple[Rule, dict[str, Any]]] = {
        "S3 answers 503": (Rule(Fault(status=503), times=times), {"times": times}),
        "S3 answers 500": (Rule(Fault(status=500), times=times), {"times": times}),
        "S3 resets connections": (Rule(Fault(reset=when), times=times), {"times": times, "when": when}),
        "S3 stalls": (Rule(Fault(stall=True), method=method), {"method": method}),
        "S3 is slow": (Rule(slow), {"bytes_per_second": speed}),
        "S3 flips bits of uploads": (Rule(flip_up, method="PUT", words=_OBJECTS, times=times), {"times": times}),
        "S3 flips bits of downloads": (Rule(flip_down, method="GET", words=_OBJECTS, times=times), {"times": times}),
        "S3 cuts bodies": (Rule(Fault(truncate=True), method="GET", times=times), {"times": times}),
        "S3 says 200 with an error in it": (
            Rule(Fault(error_in_200=True), method="POST", times=times),
            {"times": times},
        ),
        "S3 is out": (Rule(out), {"how": "stalls" if out.stall else out.reset or out.status}),
    }
    return found[kind]


# --- damage while nothing runs -------------------------------------------------------------------------------


def damage(kind: str, site: Site, places: RunPlaces, draw: random.Random) -> Done | None:
    """Flip, cut off or delete something in a tier; None when it holds nothing."""
    what, tier = kind.rsplit(" ", 1)
    # Where in the list of files, by their names and so by their steps: the newest matter most. A share, so that another
    # number of files leaves the other draws alone.
    share = max(draw.random(), draw.random())
    offset_share, bit = draw.random(), draw.randrange(8)
    if tier == S3:
        names = sorted(name for name in site.objects(places.uri) if name.startswith("step-"))
        if not names:
            return None
        name = names[int(share * len(names))]
        details = _damage_object(what, site, places.uri / name, offset_share, bit)
        return Done(kind, {"object": name, **details})
    files = _files(site, places, tier)
    if not files:
        return None
    path = files[int(share * len(files))]
    return Done(kind, {"file": "/".join(path.parts[-3:]), **_damage_file(what, path, offset_share, bit)})


def _files(site: Site, places: RunPlaces, tier: str) -> list[Path]:
    if tier == DISK:
        return sorted(path for path in places.checkpoint_dir.glob("step-*/*") if path.is_file())
    assert tier in (MEMORY, LOCAL), tier
    return [
        path
        for held, _, root in blob_roots(site, places)
        if held == tier
        for path in sorted(root.glob("*/rank-*/*"))
        if path.is_file()
    ]


def _damage_file(what: str, path: Path, offset_share: float, bit: int) -> dict[str, Any]:
    size = path.stat().st_size
    offset = int(offset_share * size)
    if what == "delete a file in":
        path.unlink()
        return {}
    if what == "cut off a file in":
        os.truncate(path, offset)
        return {"at": offset, "of": size}
    if size:
        with open(path, "r+b") as file:
            file.seek(offset)
            old = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([old ^ 1 << bit]))
    return {"at": offset, "of": size, "bit": bit}


def _damage_object(what: str, site: Site, uri: S3Uri, offset_share: float, bit: int) -> dict[str, Any]:
    if what == "delete a file in":
        site.delete_object(uri)
        return {}
    content = bytearray(site.read_object(uri))
    offset, size = int(offset_share * len(content)), len(content)
    if what == "cut off a file in":
        site.write_object(uri, bytes(content[:offset]))
        return {"at": offset, "of": size}
    if content:
        content[offset] ^= 1 << bit
        site.write_object(uri, bytes(content))
    return {"at": offset, "of": size, "bit": bit}
