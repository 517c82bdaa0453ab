"""`hypershard doctor`: what this machine is, what is wrong with it, and how to mend it.

    examine        everything that can be seen from one machine, without starting anything that computes
    examine_node   a node of a job: its GPUs against the catalog, and an all-reduce with the job's other nodes

Imports no torch: a login node has none, and on a node that is ill it may be what hangs. The checks lie in checks_*.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..catalog.instances import Instance, instance
from ..distributed.env import Ranks, read_ranks
from ..distributed.spawn import num_gpus
from ..errors import ConfigError
from . import checks_cloud, checks_gpu, checks_host, checks_network, checks_place
from .checks_base import Finding, Machine, Remedy, Status, run_checks
from .checks_probe import judge, run_probe

NODE_SECONDS = 60.0
"""How long the check of a node takes at most, unless another limit is given."""

_LEAST_PROBE_SECONDS = 20.0  # to start Python, import torch and tell the other nodes that this one is ill
_RANKS_WITHOUT_GPUS = 2  # an all-reduce of one rank would prove nothing


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node as Slurm calls it where it does, else as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def this_machine(*, expect: str | None, bucket: str | None = None, must_train: bool = False) -> Machine:
    """The machine this runs on. `expect`: the type it should be, None: what it says of itself, if the catalog has it.

    Raises ConfigError for an `expect` that the catalog does not have.
    """
    machine = Machine(must_train=must_train, bucket=bucket)
    return replace(machine, instance=_row(machine, expect))


def _row(machine: Machine, expect: str | None) -> Instance | None:
    if expect is not None:
        return instance(expect, flag="--expect")
    try:
        return instance(checks_place.instance_type(machine).instance_type)
    except ConfigError:  # an instance without GPUs, or none of AWS
        return None


def examine(machine: Machine) -> list[Finding]:
    """Every check, side by side; ends when the slowest has answered or was given up."""
    modules = (checks_place, checks_gpu, checks_network, checks_host, checks_cloud)
    return run_checks([check for module in modules for check in module.CHECKS], machine)


@dataclass(frozen=True)
class NodeReport:
    """One node's findings, and what they prove about it."""

    host: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        return any(finding.status is Status.FAIL for finding in self.findings)

    @property
    def remedy(self) -> Remedy:
        remedies = {finding.remedy for finding in self.findings}
        return next((remedy for remedy in (Remedy.REPLACE, Remedy.REBOOT) if remedy in remedies), Remedy.NONE)

    def evidence(self) -> dict[str, Any]:
        """`{"host": …, "verdict": …, "reason": …}`: the line that launch/verdict.py reads.

        A failure that this node alone did not cause keeps the verdict "ok": nobody may replace a node for its peers.
        """
        reasons = [_sentence(finding) for finding in self.findings if finding.remedy is self.remedy is not Remedy.NONE]
        reasons = reasons or [_sentence(finding) for finding in self.findings if finding.status is Status.FAIL]
        reasons = reasons or [_sentence(finding) for finding in self.findings if finding.name.startswith("all-reduce")]
        return {"host": self.host, "verdict": str(self.remedy), "reason": "; ".join(reasons)}


def _sentence(finding: Finding) -> str:
    return f"{finding.name}: {finding.found}"


def as_record(finding: Finding) -> dict[str, Any]:
    return {name: str(value) for name, value in asdict(finding).items()}


def node_place() -> Ranks:
    """This process's place among the nodes: one task per node of a Slurm step, or alone.

    Raises ConfigError where it was started once per GPU: the check starts those ranks itself.
    """
    place = read_ranks()
    if place.launcher == "torchrun" or place.local_world_size > 1:
        raise ConfigError(
            f"--node: found {place.local_world_size} tasks on this node, started by {place.launcher}; expected one, "
            f"which starts a rank per GPU itself: srun --ntasks-per-node=1 hypershard doctor --node"
        )
    return place


def examine_node(
    machine: Machine, place: Ranks, *, nproc_per_node: int | None, limit_seconds: float, num_bytes: int | None = None
) -> NodeReport:
    """Check this node, then take part in the all-reduce of all nodes, or tell them that this one is ill.

    `nproc_per_node` None: a rank per GPU that the node should have, two where it should have none. Over after
    `limit_seconds`, or a little later where GPUs already took most of them to answer.
    """
    started = time.monotonic()
    # Whether torch starts, the ranks show.
    checks = [*checks_gpu.CHECKS, *checks_network.CHECKS, *(c for c in checks_host.CHECKS if c.name != "torch")]
    findings = run_checks(checks, machine)
    ill = [finding for finding in findings if finding.remedy is not Remedy.NONE]
    ranks_per_node = nproc_per_node or _expected_ranks(machine)
    left = max(_LEAST_PROBE_SECONDS, limit_seconds - (time.monotonic() - started))
    if not ill or place.world_size > 1:
        outcome = run_probe(
            place,
            ranks_per_node=ranks_per_node,
            trouble="; ".join(_sentence(finding) for finding in ill),
            limit_seconds=left,
            num_bytes=num_bytes,
        )
        if not ill:
            findings += judge(
                outcome, num_nodes=place.world_size, ranks_per_node=ranks_per_node, instance=machine.instance
            )
    return NodeReport(host_name(machine.environment), tuple(findings))


def _expected_ranks(machine: Machine) -> int:
    """The same number on every node, also on one that has lost a GPU: the others count on it."""
    if machine.instance is not None:
        return machine.instance.num_gpus
    return num_gpus() or _RANKS_WITHOUT_GPUS
