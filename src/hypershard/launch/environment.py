"""Environment variables that every rank of a job gets, and why. What NCCL, EFA and torch do unasked is left to them.

Read from: aws/aws-ofi-nccl 1.21.1, ofiwg/libfabric, NVIDIA/nccl and the EFA cheatsheet of
awslabs/awsome-distributed-training, all of 2026; torch 2.11 and 2.13 for the names they read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..catalog.instances import Instance
from ..errors import ConfigError

# SageMaker kills a container 120 s after asking it to stop: 100 leaves time to upload the last lines.
_SHUTDOWN_SECONDS = 100

REASONS = {
    "PYTORCH_ALLOC_CONF": "memory in pieces that grow: long and short batches leave no holes",
    "OMP_NUM_THREADS": "the node's physical cores, shared by its GPUs; torchrun would set 1",
    "NCCL_DEBUG": "NCCL says what goes wrong, and no more",
    "TORCH_FR_DUMP_TEMP_FILE": "what each rank was waiting for when the job hung, one file per rank in the run directory",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "write those files when a collective runs out of time",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "seconds that ranks have for a last save when the job is stopped; default 30",
    "FI_EFA_USE_HUGE_PAGE": "forked workers run out of memory over EFA's huge pages",
    "NCCL_SHM_USE_CUDA_MEMCPY": "GPUs without NVLink: through host memory by the copy engines",
}
"""Variable -> one line that says what it is for; every variable of `environment_for` is here."""

_REFUSED = {
    "FI_EFA_USE_DEVICE_RDMA": "is obsolete and ends the program where EFA has no RDMA",
    "FI_EFA_MTU_SIZE": "was removed; libfabric ends the program when it is set",
    "FI_EFA_TX_IOV_LIMIT": "was removed; libfabric ends the program when it is set",
    "FI_EFA_RX_IOV_LIMIT": "was removed; libfabric ends the program when it is set",
    "FI_EFA_SET_CUDA_SYNC_MEMOPS": "is obsolete; libfabric ignores it since 1.21",
    "FI_EFA_ENABLE_SHM_TRANSFER": "does nothing any more",
    "RDMAV_FORK_SAFE": "turns huge pages off for good and slows EFA",
    "NCCL_TIMEOUT": "is read by neither NCCL nor torch",
    "NCCL_ASYNC_ERROR_HANDLING": "is the old name of what torch does by default",
}
# Set by what starts the ranks; another value would tear the job apart.
_OWNED = re.compile(r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(SLURM|TORCHELASTIC)_.*")
_SECRET = re.compile(r".*(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY)S?(_ID|_KEY)?", re.I)


def environment_for(instance: Instance | None, *, run_dir: str) -> dict[str, str]:
    """Variables for the ranks on `instance`; None: a machine that the catalog does not know, perhaps without GPUs."""
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "WARN",
        # torch appends the rank. Straight into the run directory: torch makes no folders.
        "TORCH_FR_DUMP_TEMP_FILE": f"{run_dir.rstrip('/')}/nccl_trace_rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }
    if instance is None:
        return environment
    environment["OMP_NUM_THREADS"] = str(max(1, instance.num_cores // instance.num_gpus))
    if instance.efa_interfaces:
        environment["FI_EFA_USE_HUGE_PAGE"] = "0"
    if instance.num_gpus > 1 and instance.interconnect is None:
        environment["NCCL_SHM_USE_CUDA_MEMCPY"] = "1"
    return environment


def check_extra(variables: Mapping[str, str]) -> None:
    """Refuse variables that a user should not add to a job. Raises ConfigError saying why, without the value."""
    for name in variables:
        if name in _REFUSED:
            raise ConfigError(f"--environment {name}: this variable {_REFUSED[name]}; leave it out")
        if _OWNED.fullmatch(name):
            raise ConfigError(f"--environment {name}: what starts the ranks sets this variable; leave it out")
        if _SECRET.fullmatch(name):
            raise ConfigError(
                f"--environment {name}: a job's text can be read by many, so no secret may stand in it; give the node "
                f"a role, or keep the secret in a file that the job reads"
            )
