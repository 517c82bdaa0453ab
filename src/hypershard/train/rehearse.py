"""Synthetic batches before the first real one: compile now, and run out of memory now, not in an hour."""

from __future__ import annotations

import time

import torch

from ..data.packing import Batch
from ..distributed.collectives import from_main
from .setup import Job
from .state import seed_everything
from .step import accumulate_gradients, on_device


def rehearse(job: Job) -> None:
    """Run forward and backward on batches of the real shapes, and forwards of validation; leave no trace.

    Dense attention takes packed documents through a mask and a single one without, which are two kernels and two
    compiled graphs, so with --document_mask both are met. Two micro-steps where the run accumulates, because the second
    one holds the first one's gradients. Nothing is updated: gradients are dropped and the next step seeds its own
    random numbers.
    """
    seed_everything(job.seed, step=0, rank=job.world.ranks.rank)
    train_size, val_size = job.batch_sizes
    for num_documents in (1, 2) if job.document_mask else (1,):
        batch = _synthetic_batch(job, train_size, num_documents)
        accumulate_gradients(job, [batch] * min(2, job.accumulation))
        job.optimizer.zero_grad()
        with torch.no_grad():
            job.module.eval()
            job.module(*on_device(job, _synthetic_batch(job, val_size, num_documents)))
            job.module.train()
    job.sharded.reshard()


def measured_step_seconds(job: Job) -> float:
    """About how long a step takes: one micro-step of random tokens, on rank 0's clock, times those of a step.

    To be called after `rehearse`, so that nothing is compiled any more. Leaves no trace either.
    """
    batch = _synthetic_batch(job, job.batch_sizes[0], 1)
    started_at = time.perf_counter()
    sums, _ = accumulate_gradients(job, [batch])
    sums.tolist()  # waits for the device
    seconds = time.perf_counter() - started_at
    job.optimizer.zero_grad()
    job.sharded.reshard()
    return float(from_main(seconds)) * job.accumulation


def _synthetic_batch(job: Job, batch_size: int, num_documents: int) -> Batch:
    """Random tokens [B, T], each row `num_documents` documents of equal length."""
    context_tokens = job.model.max_context_width
    shape = (batch_size, context_tokens)
    assert job.model.vocab_size is not None
    ids = torch.randint(job.model.vocab_size, shape)
    positions = torch.arange(context_tokens) % -(-context_tokens // num_documents)
    return Batch(input_ids=ids, labels=ids, position_ids=positions.expand(shape).contiguous())
