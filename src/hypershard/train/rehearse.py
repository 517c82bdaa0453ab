"""One synthetic batch before the first real one: compile now, and run out of memory now, not in an hour."""

from __future__ import annotations

import torch

from ..data.packing import Batch
from .setup import Job
from .state import seed_everything
from .step import accumulate_gradients, on_device


def rehearse(job: Job) -> None:
    """Run forward and backward on batches of the real shape, and one forward of validation; leave no trace.

    Two micro-steps where the run accumulates, because the second one holds the first one's gradients.
    Nothing is updated: gradients are dropped and the next step seeds its own random numbers.
    """
    seed_everything(job.seed, step=0, rank=job.world.ranks.rank)
    batch = _synthetic_batch(job, job.batch_sizes[0])
    accumulate_gradients(job, [batch] * min(2, job.accumulation))
    job.optimizer.zero_grad()
    with torch.no_grad():
        job.module.eval()
        job.module(*on_device(_synthetic_batch(job, job.batch_sizes[1]), job.world.device))
        job.module.train()
        job.sharded.reshard()


def _synthetic_batch(job: Job, batch_size: int) -> Batch:
    shape = (batch_size, job.model.max_context_width)
    assert job.model.vocab_size is not None
    ids = torch.randint(job.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return Batch(input_ids=ids, labels=ids, position_ids=positions)
