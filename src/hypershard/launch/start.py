"""From a container's arguments and surroundings to a program under a supervisor: `python -m hypershard.launch.start`.

    train --model … --lr …    ranks by torchrun, on every node of the job; on SageMaker the flags that channels and
                              hyperparameters stand for go before these
    any other verb            `hypershard VERB …`, once, under the same supervisor

Two flags are the supervisor's own: --nproc_per_node (default: the GPUs here, or one rank) and --max_restarts (default:
0; how often torchrun starts failed ranks again on all nodes, which keeps checkpoints in memory).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..distributed.spawn import num_gpus
from ..errors import ConfigError, HypershardError
from ..log import logger, setup_logging
from .failure import redact, write_failure
from .job import Job
from .node import TORCHRUN, Ending, Supervisor
from .sagemaker_environment import channel_flags, flags_of
from .surroundings import ML, NodePlace, Platform, find_place, read_object

START_SECONDS = 1200.0  # until all nodes are there: a large image takes this long to be fetched
SHUTDOWN_SECONDS = 100  # torchrun's own patience with ranks it ends; SageMaker kills 120 s after asking to stop
_RUN_DIR = ML / "output/data"  # SageMaker keeps it when the job ends
_PROGRAM = ("-m", "hypershard.cli.main")
_ANSWERED_ONCE = {"-h", "--help", "--show_config"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the container was started for; returns its exit code and leaves the reason of a failure."""
    setup_logging()
    words = list(sys.argv[1:] if argv is None else argv)
    place = NodePlace(failure_file=ML / "output/failure" if ML.exists() else None)  # until we know better
    try:
        place = find_place()
        ending = supervise(_command(words, place), os.environ, place)
    except HypershardError as error:
        ending = Ending(error.exit_code, f"{place.host}: {error}")
    if ending.error:
        logger.error(redact(ending.error))
        write_failure(place.failure_file, ending.error)
    return ending.code


def run_here(job: Job) -> int:
    """Run a job on this machine, under the supervisor that a container has; returns its exit code.

    Raises ConfigError for a job of several nodes or in an image: those are for a cluster.
    """
    ending = supervise(local_command(job), {**os.environ, **job.environment}, NodePlace())
    if ending.error:
        logger.error(redact(ending.error))
    return ending.code


def local_command(job: Job) -> list[str]:
    """What `run_here` runs. Raises ConfigError as it does."""
    if job.resources.num_nodes != 1:
        raise ConfigError(f"--nodes={job.resources.num_nodes}: this machine is one node; use 1")
    if job.image is not None:
        raise ConfigError(f"--image={job.image}: a local job runs in what is installed here; drop the flag")
    flags = [*job.train_flags, f"--max_restarts={job.max_restarts}"]
    if job.resources.gpus_per_node:
        flags.append(f"--nproc_per_node={job.resources.gpus_per_node}")
    return _training(flags, NodePlace())


def supervise(command: Sequence[str], environment: Mapping[str, str], place: NodePlace) -> Ending:
    """Run `command` as this node's part of a job, with what its ranks need to know of the place."""
    added = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        # Ranks that are started again meet in a store of their own. In the agents' they may find the keys of those
        # before: it tells starts apart by a count that each agent keeps for itself, of its own ranks' failures only.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if place.interface:
        added |= {"GLOO_SOCKET_IFNAME": place.interface, "NCCL_SOCKET_IFNAME": place.interface}
    supervisor = Supervisor(command, {**added, **environment}, place)
    where = f"{place.platform.value}: node {place.node_rank} of {place.num_nodes} ({place.host})"
    logger.info(f"{where}, process {os.getpid()}")
    logger.info(redact(" ".join(command[1:]), environment))
    return supervisor.run(start_seconds=START_SECONDS)


def _command(words: list[str], place: NodePlace) -> list[str]:
    if not words or words[0] != "train" or _ANSWERED_ONCE & set(words):
        return [sys.executable, *_PROGRAM, *words]
    flags = words[1:]
    if place.platform is Platform.SAGEMAKER:
        flags = _asked_on_sagemaker(flags)
    return _training(flags, place)


def _asked_on_sagemaker(flags: list[str]) -> list[str]:
    """Channels, then hyperparameters, then the container's arguments: later flags win."""
    given = [*flags_of(_input("hyperparameters.json")), *flags]
    names = {word.partition("=")[0] for word in given}
    found = channel_flags(_input("inputdataconfig.json"), data=ML / "input/data")
    found = [flag for flag in found if flag.partition("=")[0] not in names]
    if "--run_dir" not in names:
        found.append(f"--run_dir={_RUN_DIR}")
    return [*found, *given]


def _input(name: str) -> dict[str, Any]:
    """One of SageMaker's files; a job without channels or hyperparameters may have none."""
    path = ML / "input/config" / name
    return read_object(path) if path.exists() else {}


def _training(flags: Sequence[str], place: NodePlace) -> list[str]:
    """torchrun's command line. Raises ConfigError for a number that is none."""
    flags, ranks = _taken(flags, "--nproc_per_node", otherwise=max(1, num_gpus()))
    flags, restarts = _taken(flags, "--max_restarts", otherwise=0)
    endpoint = f"{place.main_host}:{place.port}" if place.num_nodes > 1 else f"{place.main_host}:0"  # 0: a free one
    torchrun = [
        f"--nnodes={place.num_nodes}",
        f"--nproc_per_node={ranks}",
        f"--max_restarts={restarts}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={endpoint}",
        f"--rdzv_id={place.job}",
        # Not by comparing host names, which are all the same on some platforms.
        f"--rdzv_conf=is_host={'true' if place.node_rank == 0 else 'false'}",
        f"--local_addr={place.host}",
    ]
    return [sys.executable, "-m", TORCHRUN, *torchrun, *_PROGRAM, "train", *flags]


def _taken(flags: Sequence[str], name: str, *, otherwise: int) -> tuple[list[str], int]:
    """`flags` without the supervisor's own flag `name`, and its value; the last one wins."""
    rest: list[str] = []
    text = str(otherwise)
    words = iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == name:
            text = value if equals else next(words, "")
        else:
            rest.append(word)
    if not text.isdigit():
        raise ConfigError(f"{name}: found {text!r}, expected a whole number")
    return rest, int(text)


if __name__ == "__main__":
    sys.exit(main())
