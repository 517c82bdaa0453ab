"""The all-reduce of a health check: start this node's ranks, read what they saw and what NCCL logged, and judge it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalog.bus_bandwidth import BusBandwidth, bus_bandwidth
from ..catalog.instances import Instance
from ..distributed.env import Ranks
from .checks_base import Finding, Remedy, fail, ok, warn

# A healthy fabric repeats itself within a few percent; below these something is broken or badly set.
_WARN_SHARE, _FAIL_SHARE = 0.8, 0.5
_GRACE_SECONDS = 3.0
_SLOW_NETWORK = (
    "NCCL_DEBUG=INFO shows what it talks over; are all nodes in one placement group, all EFA interfaces there?"
)


@dataclass(frozen=True)
class NcclLog:
    """What NCCL and its plugin wrote at NCCL_DEBUG=INFO; "" and 0 for lines that are not there."""

    version: str = ""
    plugin: str = ""
    libfabric: str = ""
    provider: str = ""
    num_interfaces: int = 0
    network: str = ""
    uses_gpudirect: bool = False


def parse_nccl_log(text: str) -> NcclLog:
    """Read a NCCL log. The plugin wrote `Selected Provider is efa (found 4 nics)`, now with `, fabric is …` in it."""

    def first(pattern: str) -> str:
        match = re.search(pattern, text, flags=re.IGNORECASE | re.MULTILINE)
        return match.group(1).strip() if match else ""

    selected = re.search(r"NET/OFI Selected provider is ([\w-]+).*?\(found (\d+) nics?\)", text, flags=re.IGNORECASE)
    return NcclLog(
        version=first(r"NCCL version (\d[\d.]*)"),
        plugin=first(r"NET/OFI Initializing aws-ofi-nccl (\S+)"),
        libfabric=first(r"NET/OFI Using Libfabric version (\S+)"),
        provider=selected.group(1) if selected else "",
        num_interfaces=int(selected.group(2)) if selected else 0,
        network=first(r"Using network (.+)$"),
        uses_gpudirect="/GDRDMA" in text,
    )


@dataclass(frozen=True)
class Outcome:
    """What this node's ranks left: `seen` by local rank (as distributed/health.py writes it), the log, loose words.

    `printed` are the last lines of a rank that wrote nothing; `is_late`: they were ended at the limit.
    """

    seen: Mapping[int, Mapping[str, Any]]
    nccl: NcclLog
    printed: str = ""
    is_late: bool = False


def run_probe(
    place: Ranks, *, ranks_per_node: int, trouble: str, limit_seconds: float, num_bytes: int | None
) -> Outcome:
    """Start this node's ranks and wait for them, at most `limit_seconds`.

    `place` is this process's place among the nodes: its rank is the node's number, its world size how many there are.
    A node in `trouble` starts one rank that only says so.
    """
    with tempfile.TemporaryDirectory(prefix="hypershard-health-") as text:
        folder = Path(text)
        started = range(1 if trouble else ranks_per_node)
        words = [sys.executable, "-m", "hypershard.distributed.health", f"--node_port={_free_port()}"]
        words += [f"--ends_at={time.time() + limit_seconds - _GRACE_SECONDS}", f"--trouble={trouble}"]
        words += [f"--num_bytes={num_bytes}"] if num_bytes is not None else []
        children = [_start(words, folder, place, local_rank, ranks_per_node) for local_rank in started]
        is_late = not _finished(children, time.monotonic() + limit_seconds)
        seen = {}
        for local_rank in started:
            with contextlib.suppress(OSError, ValueError):
                seen[local_rank] = json.loads((folder / f"{local_rank}.json").read_text())
        silent = [local_rank for local_rank in started if local_rank not in seen]
        printed = (folder / f"{silent[0]}.log").read_text(errors="replace") if silent else ""
        log = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("nccl.*")))
    return Outcome(seen, parse_nccl_log(log), _last_words(printed), is_late)


def _start(
    words: Sequence[str], folder: Path, place: Ranks, local_rank: int, ranks_per_node: int
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(place.rank * ranks_per_node + local_rank),
        "WORLD_SIZE": str(place.world_size * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET",
        "NCCL_DEBUG_FILE": str(folder / "nccl.%p"),
        "OMP_NUM_THREADS": "1",
    }
    with open(folder / f"{local_rank}.log", "wb") as log:
        return subprocess.Popen(
            [*words, f"--output={folder / f'{local_rank}.json'}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _finished(children: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Wait for all; False when some had to be ended. One that hangs in a driver is left to the kernel."""
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_words(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip() and not line.startswith("frame #")]
    return lines[-1][:300] if lines else ""


def judge(outcome: Outcome, *, num_nodes: int, ranks_per_node: int, instance: Instance | None) -> list[Finding]:
    """What the ranks' reports say about this node (with a remedy) and about what lies between nodes (without one)."""
    findings = _judge_ranks(outcome, ranks_per_node)
    if findings:
        return findings
    first = outcome.seen[0]
    name = instance.name if instance else ""
    if first["node"] is not None:
        row = bus_bandwidth(name, 1) if instance and ranks_per_node == instance.num_gpus else None
        findings.append(_judge_speed("all-reduce in the node", first, first["node"], row))
    if num_nodes > 1:
        findings += _judge_world(first, num_nodes, name)
        findings += _judge_efa(outcome.nccl, instance, num_nodes) if first["backend"] == "nccl" else []
    elif first["backend"] == "nccl":
        findings += _judge_efa(outcome.nccl, instance, num_nodes)
    return findings


def _judge_ranks(outcome: Outcome, ranks_per_node: int) -> list[Finding]:
    """Ranks that left no report, met an error, or got another sum: what makes the rest not worth reading."""
    silent = [rank for rank in range(ranks_per_node) if rank not in outcome.seen]
    if silent:
        late = "no end within the limit" if outcome.is_late else "ended without a report"
        said = f"; it said: {outcome.printed}" if outcome.printed else ""
        fix = (
            "run it again; a rank that hangs every time points at its GPU or driver, an ImportError at the environment"
        )
        return [fail("all-reduce", f"ranks {', '.join(map(str, silent))} of this node: {late}{said}", fix)]
    for what in ("node", "world"):
        wrong = [rank for rank, seen in outcome.seen.items() if seen[what] is not None and not seen[what]["is_right"]]
        if wrong and what == "node":
            found = "the sum over this node's ranks is wrong: its memory, GPUs or links change what passes through"
            return [fail("all-reduce in the node", found, "replace the node", Remedy.REPLACE)]
        if wrong:
            fix = "take half of the nodes, then the other: doctor --node names the bad half"
            return [fail("all-reduce over nodes", "the sum over all ranks is wrong; no single node is proved ill", fix)]
    errors = {str(seen["error"]) for seen in outcome.seen.values() if seen["error"]}
    if errors:
        fix = "NCCL_DEBUG=INFO says more; firewalls and security groups must let nodes talk on all ports"
        return [fail("all-reduce", "; ".join(sorted(errors)), fix)]
    return []


def _judge_speed(name: str, seen: Mapping[str, Any], result: Mapping[str, Any], row: BusBandwidth | None) -> Finding:
    if result["num_ranks"] == 1:
        return ok(name, f"one rank alone ({seen['backend']}): it starts, and has nobody to talk to")
    size_gib = result["num_bytes"] / 2**30
    speed = result["gb_per_second"]
    found = f"{result['num_ranks']} ranks ({seen['backend']}), {size_gib:.3g} GiB: {speed:.3g} GB/s bus bandwidth"
    if row is None or seen["backend"] != "nccl":
        return ok(name, f"{found}; nothing to compare it with")
    share = speed / row.gb_per_second
    found += f", {share:.0%} of {row.gb_per_second:g} ({row.source}, {row.date})"
    if share >= _WARN_SHARE:
        return ok(name, found)
    inside = row.num_nodes == 1
    fix = "reboot the node (NVLink, fabric manager), replace it when that does not help" if inside else _SLOW_NETWORK
    if share >= _FAIL_SHARE:
        return warn(name, found, fix)
    return fail(name, found, fix, Remedy.REBOOT if inside else Remedy.NONE)


def _judge_world(seen: Mapping[str, Any], num_nodes: int, instance_name: str) -> list[Finding]:
    name = "all-reduce over nodes"
    if seen["absent"] or seen["ill"]:
        said = [f"node {number} is ill ({text})" for number, text in seen["ill"].items()]
        said += [f"node {number} did not come in time" for number in seen["absent"]]
        fix = "nodes are numbered from 0, as in scontrol show hostnames: mend or leave out those, and run it again"
        return [fail(name, f"not done over {num_nodes} nodes: {'; '.join(said)}", fix)]
    return [_judge_speed(name, seen, seen["world"], bus_bandwidth(instance_name, num_nodes))]


def _judge_efa(log: NcclLog, instance: Instance | None, num_nodes: int) -> list[Finding]:
    """Whether NCCL really talks over EFA, from its own words."""
    if instance is None or not instance.efa_interfaces:
        return [ok("network", f"NCCL {log.version or 'of unknown version'} uses {log.network or 'an unnamed network'}")]
    found = f"NCCL {log.version}, aws-ofi-nccl {log.plugin or 'not loaded'}, libfabric {log.libfabric or 'unknown'}"
    if not log.provider.startswith("efa"):
        spoken = log.provider or log.network or "sockets"
        fix = "put the folder of libnccl-net-ofi.so in LD_LIBRARY_PATH, and do not set NCCL_NET or FI_PROVIDER"
        tell = fail if num_nodes > 1 else warn
        return [tell("network", f"{found}: talks over {spoken}, not over EFA", fix)]
    found += f", provider {log.provider} on {log.num_interfaces} interfaces"
    if num_nodes > 1 and instance.gpudirect_rdma and not log.uses_gpudirect:
        fix = "a newer EFA installer and NVIDIA driver (the open kernel module lets EFA read GPU memory)"
        return [warn("network", f"{found}, but without GPUDirect RDMA: each message goes through host memory", fix)]
    return [ok("network", found + (", GPUDirect RDMA" if log.uses_gpudirect else ""))]
