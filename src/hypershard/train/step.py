"""One optimizer step: every micro-batch forward and backward, one look at the result, one update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from ..data.packing import Batch
from ..distributed.collectives import sum_over_ranks
from ..optim.adamw import set_learning_rate
from ..optim.gradients import clip, local_gradients, sum_of_squares
from .attention import Segments
from .setup import Job
from .state import Progress, StepReport, seed_everything


def train_step(job: Job, progress: Progress, *, flags: Callable[[], Sequence[float]]) -> StepReport:
    """Do the step after `progress`. The weights stay as they are if the loss or the gradient is not finite.

    Besides FSDP2's own there are two collectives: the count of the loss's terms before backward, so that it is
    normalised over all ranks and micro-steps, and one vector after it (gradient norm, sums, this rank's `flags`).
    No rank comes past the second one before every rank's last memory checkpoint is whole.
    """
    started_at = time.perf_counter()
    step = progress.step + 1
    seed_everything(job.seed, step=step, rank=job.world.ranks.rank)
    batches = job.data.loader.step(progress.samples, accumulation=job.accumulation)
    data_seconds = time.perf_counter() - started_at
    sums, num_terms = accumulate_gradients(job, batches)
    gradients = local_gradients(job.parameters.values())
    job.checkpoints.settle()
    totals = sum_over_ranks(
        [sum_of_squares(gradients) / job.sharded.num_replicas, *sums, *flags()], device=job.world.device
    ).tolist()
    grad_norm = math.sqrt(totals[0])
    loss, *statistics = (total / num_terms.item() for total in totals[1 : 1 + len(sums)])
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    lr = job.learning_rate(progress)
    if not skipped:
        clip(gradients, norm=grad_norm, limit=job.optim.grad_clip)
        set_learning_rate(job.optimizer, lr)
        job.optimizer.step()
    job.optimizer.zero_grad()
    return StepReport(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=job.tokens_per_step,
        samples=job.samples_per_step,
        seconds=time.perf_counter() - started_at,
        data_seconds=data_seconds,
        padding=sum(batch.num_padding_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches),
        skipped=skipped,
        statistics=dict(zip(job.module.statistics, statistics, strict=True)),
        flags=tuple(total > 0 for total in totals[1 + len(sums) :]),
    )


def accumulate_gradients(job: Job, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of all micro-batches; gradients of the mean loss per term are left in place.

    Returns this rank's sums as `LanguageModel.forward` gives them, and the number of terms over all ranks (tokens, or
    pairs), float32 on the device.
    """
    device = job.world.device
    counted = sum_over_ranks([float(sum(job.module.num_terms(batch) for batch in batches))], device=device)
    # Stays on the device, so that the host does not wait. A step without a single target divides by 1.
    num_terms = counted[0].clamp(min=1).float()
    totals = torch.zeros(1 + len(job.module.statistics), device=device)
    for index, batch in enumerate(batches):
        job.sharded.begin_micro_step(index, len(batches))
        sums = job.module(*on_device(job, batch))
        (sums[0] / num_terms).backward()
        totals += sums.detach()
    return totals, num_terms


def on_device(job: Job, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Segments]]:
    """The batch as `LanguageModel.forward` takes it: input_ids, labels, position_ids, int64 [B, T]; segments."""
    device = job.world.device
    input_ids, labels, position_ids = (
        tensor.to(device, non_blocking=True) for tensor in (batch.input_ids, batch.labels, batch.position_ids)
    )
    return input_ids, labels, position_ids, job.attention.segments(batch, device)
