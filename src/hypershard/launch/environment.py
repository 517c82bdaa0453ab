"""Environment variables that every rank of a job gets, and why. What NCCL, EFA and torch do unasked is left to them.

Read from the sources of aws-ofi-nccl 1.21, libfabric, NCCL 2.30 and torch 2.11 and 2.13 (all 2026), and the EFA
cheatsheet of awslabs/awsome-distributed-training: with aws-ofi-nccl from 1.7 on nothing need be set for EFA to be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..catalog.instances import Instance
from ..errors import ConfigError

# SageMaker kills a container 120 s after asking it to stop; the rest is for the last lines of the log.
_SHUTDOWN_SECONDS = 100
# Where AWS measured twice the speed by it. Elsewhere it is not known to help, and it was seen to hang.
_COPY_ENGINE_FAMILIES = ("g5", "g6")

# Variable -> one line that says what it is for; every variable of `environment_for` is here.
REASONS = {
    "PYTORCH_ALLOC_CONF": "memory in segments that grow: batches of changing length leave no holes",
    "OMP_NUM_THREADS": "the node's physical cores, shared by its GPUs; torchrun would set 1",
    "NCCL_DEBUG": "say what goes wrong in NCCL, and no more",
    "TORCH_FR_DUMP_TEMP_FILE": "what each rank was waiting for when the job hung, one file per rank",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "write those files when a collective runs out of time",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "seconds for a last save when the job is stopped; default 30, torch 2.11's only",
    "FI_EFA_USE_HUGE_PAGE": "EFA's huge pages run out when workers fork: 'Cannot allocate memory'",
    "NCCL_SHM_USE_CUDA_MEMCPY": "between GPUs through host memory by the copy engines: twice as fast on g5 and g6",
}

# Variable of old scripts -> what it does today; none of them may stand in a job.
HARMFUL = {
    "FI_EFA_USE_DEVICE_RDMA": "is obsolete, and ends the program where EFA has no RDMA",
    "FI_EFA_MTU_SIZE": "was removed; libfabric ends the program when it is set",
    "FI_EFA_TX_IOV_LIMIT": "was removed; libfabric ends the program when it is set",
    "FI_EFA_RX_IOV_LIMIT": "was removed; libfabric ends the program when it is set",
    "FI_EFA_SET_CUDA_SYNC_MEMOPS": "is ignored since libfabric 1.21",
    "FI_EFA_ENABLE_SHM_TRANSFER": "does nothing: what it asks for is the default",
    "RDMAV_FORK_SAFE": "breaks EFA on new kernels",
    "RDMAV_HUGEPAGES_SAFE": "breaks EFA on new kernels",
    "NCCL_TIMEOUT": "is read by neither NCCL nor torch",
    "NCCL_ASYNC_ERROR_HANDLING": "is an old name of what torch does by default",
}
# Set by what starts the ranks; another value would tear the job apart.
_OWNED = re.compile(r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(SLURM|TORCHELASTIC)_.*")
_SECRET = re.compile(r"(.*_)?(TOKEN|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)", re.I)


def environment_for(instance: Instance | None, *, run_dir: str) -> dict[str, str]:
    """Variables for the ranks on `instance`; None: a machine the catalog does not know, perhaps without GPUs.

    `run_dir` is where torch writes what hung; it must exist by then, for torch makes no folders.
    """
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "WARN",
        "TORCH_FR_DUMP_TEMP_FILE": f"{run_dir.rstrip('/')}/nccl_trace_rank_",  # torch appends the rank
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }
    if instance is None:
        return environment
    environment["OMP_NUM_THREADS"] = str(instance.num_cores // instance.num_gpus)
    if instance.efa_interfaces:
        environment["FI_EFA_USE_HUGE_PAGE"] = "0"
    if instance.num_gpus > 1 and instance.family in _COPY_ENGINE_FAMILIES:
        environment["NCCL_SHM_USE_CUDA_MEMCPY"] = "1"
    return environment


def check_extra(variables: Mapping[str, str]) -> None:
    """Refuse variables that nobody should add to a job. Raises ConfigError saying why, without the value."""
    for name in variables:
        if name in HARMFUL:
            raise ConfigError(f"environment variable {name}: it {HARMFUL[name]}; leave it out")
        if _OWNED.fullmatch(name):
            raise ConfigError(f"environment variable {name}: what starts the ranks sets it; leave it out")
        if _SECRET.fullmatch(name):
            raise ConfigError(
                f"environment variable {name}: a job's text is read by many, so no secret may stand in it; give the "
                f"nodes a role, or keep the secret in a file that the job reads"
            )
