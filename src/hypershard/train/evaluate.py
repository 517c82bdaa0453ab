"""Validation: mean loss over the same held-out sequences each time."""

from __future__ import annotations

import torch

from ..distributed.collectives import sum_over_ranks
from .setup import Job
from .step import on_device


@torch.no_grad()
def evaluate(job: Job) -> dict[str, float]:
    """`validation_loss`, in nats per token (or pair), and the means beside it, over --validation_batches a rank."""
    device = job.world.device
    names = ("loss", *job.module.statistics)
    sums = torch.zeros(len(names), device=device)
    num_terms = 0
    job.module.eval()
    try:
        for batch in job.data.validation():
            sums += job.module(*on_device(job, batch))
            num_terms += job.module.num_terms(batch)
    finally:
        job.module.train()
        job.sharded.reshard()
    *totals, count = sum_over_ranks([*sums, float(num_terms)], device=device).tolist()
    return {f"validation_{name}": total / max(1.0, count) for name, total in zip(names, totals, strict=True)}
