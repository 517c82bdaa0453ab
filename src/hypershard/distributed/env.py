"""The only reader of rank variables: who am I among the processes of this job.

Three ways to be started are understood, in this order:

    torchrun, or `hypershard train` starting its own ranks
        RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    srun, one task per GPU
        SLURM_STEP_ID SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_STEP_TASKS_PER_NODE SLURM_STEP_NODELIST
        SLURM_JOB_ID
    a person, alone
        none: one rank
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job. `launcher` is "torchrun", "srun" or "alone"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    launcher: str = "alone"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Surroundings:
    """What the environment says of this process's place in the cluster.

    `interface` is the network interface that ranks are told to talk over (GLOO_SOCKET_IFNAME), None: the way to
    `main_host`, where rank 0 is. `domain` names what fails together with this node (its switches, where Slurm knows the
    topology), "" when unknown. `launcher_pid` is the process whose end is the job's end on this node. `ends_at` is when
    Slurm ends the job, in seconds since 1970; None: unknown.
    """

    main_host: str = "127.0.0.1"
    interface: str | None = None
    domain: str = ""
    launcher_pid: int = 0
    ends_at: float | None = None


def read_surroundings(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> Surroundings:
    end = environment.get("SLURM_JOB_END_TIME", "")
    return Surroundings(
        main_host=ranks.master_addr,
        interface=environment.get("GLOO_SOCKET_IFNAME") or None,
        # The switches above the node, from the top: "core.leaf3.p5-007".
        domain=environment.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0],
        launcher_pid=os.getpid() if ranks.launcher == "alone" else os.getppid(),
        ends_at=float(end) if end.isdigit() else None,
    )


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read this process's place from its environment. Raises ConfigError for a half-set environment."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return _from_srun(environment)
    return Ranks()


def _from_torchrun(environment: Mapping[str, str]) -> Ranks:
    try:
        world_size = int(environment["WORLD_SIZE"])
        return Ranks(
            rank=int(environment["RANK"]),
            world_size=world_size,
            local_rank=int(environment["LOCAL_RANK"]),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
            master_addr=environment["MASTER_ADDR"],
            master_port=int(environment["MASTER_PORT"]),
            launcher="torchrun",
        )
    except KeyError as missing:
        raise ConfigError(
            f"RANK or WORLD_SIZE is set but {missing} is not; start by torchrun, srun, or alone"
        ) from None


def _from_srun(environment: Mapping[str, str]) -> Ranks:
    job = int(environment.get("SLURM_JOB_ID", "0"))
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",", 1)[0]
    return Ranks(
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_world_size=int(tasks_per_node.split("(", 1)[0]),
        master_addr=first_host(environment["SLURM_STEP_NODELIST"]),
        # Below the kernel's ephemeral range (32768 on), so that no outgoing connection holds it already.
        master_port=20000 + (job * 16 + int(environment["SLURM_STEP_ID"]) % 16) % 12000,
        launcher="srun",
    )


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `p5-[007-010,12],x1 -> p5-007`, `a1,a2 -> a1`."""
    match = re.match(r"^([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodelist!r} names no host")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")
