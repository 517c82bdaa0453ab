"""Speed in the units papers and bills use: tokens per second, and the share of the hardware's peak (MFU)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """tokens_per_second is over all GPUs; mfu is None where the peak is unknown (on a CPU)."""

    tokens_per_second: float
    mfu: float | None


def throughput(
    *, tokens: int, seconds: float, flops_per_token: float, num_gpus: int, peak_flops_per_gpu: float | None
) -> Throughput:
    """Model FLOPs utilisation as in the PaLM paper (arXiv 2204.02311, appendix B): what the model needs, not what
    recomputation adds, over the dense bfloat16 peak of all GPUs."""
    per_second = tokens / seconds
    if peak_flops_per_gpu is None:
        return Throughput(per_second, None)
    return Throughput(per_second, per_second * flops_per_token / (num_gpus * peak_flops_per_gpu))
