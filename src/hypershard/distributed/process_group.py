"""Start and leave the job's process group; pick this rank's device."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .env import Ranks

# A rank that waits longer than this for the others gives up. Long enough for rank 0 to tokenise a text data
# set or read a large checkpoint from a slow disk; a dead peer is noticed at once by its closed connection.
_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The started job: this rank's place, its device, and a gloo group for what checkpoints agree on."""

    ranks: Ranks
    device: torch.device
    checkpoint_group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.ranks.world_size


def start(ranks: Ranks) -> World:
    """Join the process group: NCCL for tensors on GPUs, gloo for those on the host.

    Raises ConfigError when there are more ranks on this node than GPUs.
    """
    device = _device(ranks)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    if ranks.world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT, device_id=bound
        )
    else:
        address = f"tcp://{ranks.master_addr}:{ranks.master_port}"
        # torchrun's agent already serves the rendezvous store; "env://" makes torch use it instead of a second one.
        method = "env://" if ranks.launcher == "torchrun" else address
        dist.init_process_group(
            backend,
            init_method=method,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=_TIMEOUT,
            device_id=bound,
        )
    return World(ranks, device, new_host_group())


def new_host_group(*, wait_seconds: float = 0.0) -> dist.ProcessGroup:
    """One more gloo group of all ranks, called by all of them. Ranks on it may wait for each other for `wait_seconds`.

    What runs in a thread beside the training needs a group of its own: on one they share, the two would wait for
    each other.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT + datetime.timedelta(seconds=wait_seconds))


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Under srun with one GPU bound to each task, that GPU is number 0 for every task.
    index = 0 if torch.cuda.device_count() == 1 and ranks.launcher == "srun" else ranks.local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {ranks.rank} is number {index} on its node, which has {torch.cuda.device_count()} GPUs; "
            f"start at most one rank per GPU (--nproc_per_node)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Refuse operations that add in an arbitrary order, before any has run.

    Flash attention's backward is one on GPUs: without this a resumed run follows an uninterrupted one to rounding,
    with it bit for bit. On a CPU nothing changes.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
    torch.use_deterministic_algorithms(True)


def leave() -> None:
    """Leave the group at a clean end, all ranks together."""
    dist.destroy_process_group()


def set_cpu_threads(ranks: Ranks) -> None:
    """Share the host's cores between its ranks when nobody said otherwise (torchrun sets OMP_NUM_THREADS=1)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
