"""Which node of which job is this: SageMaker, Kubernetes, Slurm, or a machine of its own.

SageMaker    /opt/ml/input/config/resourceconfig.json: hosts, current_host, network_interface_name
Kubernetes   JOB_COMPLETION_INDEX, which an Indexed Job sets; HYPERSHARD_NUM_NODES and HYPERSHARD_MAIN_HOST, which
             the rendered manifest sets
Slurm        SLURM_NODEID and the like of a step with one task per node
alone        none of these: one node
"""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.env import first_host
from ..errors import ConfigError
from ..storage import read_json

ML = Path("/opt/ml")  # where SageMaker puts what a container needs, and takes what it leaves
_PORT = 29400  # torchrun's own default, below the kernel's ephemeral range


class Platform(enum.Enum):
    SAGEMAKER = "SageMaker"
    KUBERNETES = "Kubernetes"
    SLURM = "Slurm"
    ALONE = "alone"


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """This node among those of its job.

    `host`, `main_host`: the names by which the others reach this node and node 0. `port`: node 0 serves the rendezvous
    there and the supervisors' links on the next one. `job`: the same on all nodes, another for each start.
    `interface`: what the platform says to talk over, or None. `failure_file`: where it wants to read why a job failed.
    """

    platform: Platform = Platform.ALONE
    host: str = "127.0.0.1"
    main_host: str = "127.0.0.1"
    node_rank: int = 0
    num_nodes: int = 1
    port: int = _PORT
    job: str = "hypershard"
    interface: str | None = None
    failure_file: Path | None = None

    @property
    def clean_stop_code(self) -> int:
        """What to end with after a signal and a save.

        Kubernetes and Slurm take 0 for "the training is done" and would not start it again; SageMaker takes anything
        else for a failure.
        """
        return 143 if self.platform in (Platform.KUBERNETES, Platform.SLURM) else 0


def find_place(environment: Mapping[str, str] = os.environ, *, ml: Path = ML) -> NodePlace:
    """Read this node's place. Raises ConfigError for half of it, naming what is missing."""
    resources = ml / "input/config/resourceconfig.json"
    if resources.exists():
        return _on_sagemaker(read_object(resources), environment, ml)
    if "JOB_COMPLETION_INDEX" in environment:
        return _on_kubernetes(environment)
    if "SLURM_STEP_NODELIST" in environment:
        return _on_slurm(environment)
    return NodePlace()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the platform's. Raises ConfigError for anything else."""
    try:
        value = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found a {type(value).__name__}, expected an object")
    return value


def _on_sagemaker(resources: dict[str, Any], environment: Mapping[str, str], ml: Path) -> NodePlace:
    here, hosts = str(resources.get("current_host")), resources.get("hosts")
    if not isinstance(hosts, list) or here not in hosts:
        raise ConfigError(f"resourceconfig.json: current_host is {here!r}, expected one of hosts, found {hosts!r}")
    ordered = sorted(hosts, key=lambda host: (len(host), host))  # algo-10 after algo-9
    return NodePlace(
        platform=Platform.SAGEMAKER,
        host=here,
        main_host=ordered[0],
        node_rank=ordered.index(here),
        num_nodes=len(ordered),
        job=environment.get("TRAINING_JOB_NAME", "hypershard"),
        interface=resources.get("network_interface_name"),
        failure_file=ml / "output/failure",
    )


def _on_kubernetes(environment: Mapping[str, str]) -> NodePlace:
    num_nodes = _number(environment, "HYPERSHARD_NUM_NODES")
    # A pod of an Indexed Job is named <job>-<index> and found as that under the headless service.
    main_host = environment.get("HYPERSHARD_MAIN_HOST", "")
    if not main_host and num_nodes > 1:
        raise ConfigError("HYPERSHARD_MAIN_HOST is not set; expected <job>-0.<service>, as in the rendered manifest")
    _, _, service = main_host.partition(".")
    return NodePlace(
        platform=Platform.KUBERNETES,
        host=f"{socket.gethostname()}.{service}" if service else socket.gethostname(),
        main_host=main_host,
        node_rank=_number(environment, "JOB_COMPLETION_INDEX"),
        num_nodes=num_nodes,
        job=main_host.partition(".")[0] or "hypershard",
        failure_file=Path("/dev/termination-log"),
    )


def _on_slurm(environment: Mapping[str, str]) -> NodePlace:
    num_nodes, num_tasks = _number(environment, "SLURM_STEP_NUM_NODES"), _number(environment, "SLURM_STEP_NUM_TASKS")
    if num_tasks != num_nodes:
        raise ConfigError(f"srun started {num_tasks} tasks on {num_nodes} nodes; use --ntasks-per-node=1")
    main_host, job = first_host(environment["SLURM_STEP_NODELIST"]), _number(environment, "SLURM_JOB_ID")
    return NodePlace(
        platform=Platform.SLURM,
        host=environment.get("SLURMD_NODENAME", main_host),
        main_host=main_host,
        node_rank=_number(environment, "SLURM_NODEID"),
        num_nodes=num_nodes,
        port=20000 + job * 2 % 12000,  # two jobs may share a node
        job=f"{job}-{environment.get('SLURM_RESTART_COUNT', '0')}-{environment.get('SLURM_STEP_ID', '0')}",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name}: found {text!r}, expected a number")
    return int(text)
