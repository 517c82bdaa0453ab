"""Peak memory of this process: the GPU's where there is one, else the host's."""

from __future__ import annotations

import resource

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes the caching allocator has reserved on `device`, or this process's largest resident set.

    Reserved, not allocated: what is reserved is what another process cannot have, and what runs out.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
