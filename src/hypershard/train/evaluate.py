"""Validation: mean loss per token over the same held-out sequences each time."""

from __future__ import annotations

import torch

from ..distributed.collectives import sum_over_ranks
from .setup import Job
from .step import on_device


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean cross entropy in nats per token over --validation_batches batches of every rank."""
    device = job.world.device
    loss_sum = torch.zeros((), device=device)
    num_tokens = 0
    job.module.eval()
    try:
        for batch in job.data.validation():
            loss_sum += job.module(*on_device(job, batch))
            num_tokens += batch.num_valid_tokens
    finally:
        job.module.train()
        job.sharded.reshard()
    total, count = sum_over_ranks([loss_sum, float(num_tokens)], device=device).tolist()
    return total / max(1.0, count)
