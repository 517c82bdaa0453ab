"""Go on from a checkpoint, and refuse or name what has changed since."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..log import logger
from ..optim.adamw import set_step_count
from .setup import Job
from .state import Progress, progress_from

# Settings of the model section that may change between two runs of the same weights.
_FREE = {
    "max_context_width",
    "max_position_embeddings",
    "router_loss_weight",
    "initializer_range",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
}


def restore(job: Job, *, source: Path | None, required: bool) -> Progress:
    """Load the newest valid checkpoint in `source` (None: the job's own) into the job and return its counters.

    With none there the run starts, unless one is `required`. Raises CheckpointError for another model's.
    """
    facts = job.checkpoints.restore(job.tensors, from_dir=source)
    if facts is None:
        if required:
            raise CheckpointError(
                f"--init_from=resume: no valid checkpoint in {source or 'checkpoint_dir'}; "
                f"name another --resume_from_checkpoint, or drop --init_from to start anew"
            )
        logger.info("no checkpoint to go on from; starting at step 0")
        return Progress()
    _refuse_other_model(job, facts)
    progress = progress_from(facts)
    set_step_count(job.optimizer, progress.optimizer_steps)
    if facts["samples_per_step"] != job.samples_per_step:
        logger.warning(
            f"a step was {facts['samples_per_step']} sequences and is now {job.samples_per_step}; to keep it, change "
            f"--train_batch_size or --gradient_accumulation_steps. No sample is lost or repeated either way"
        )
    changed = [name for name, value in job.data_identity.items() if facts["data"].get(name) != value]
    if changed:
        logger.warning(
            f"the data changed since the checkpoint ({', '.join(changed)}): reading starts at their beginning"
        )
        progress = dataclasses.replace(progress, samples=0)
    logger.info(f"going on after step {progress.step} ({progress.tokens:,} tokens seen)")
    return progress


def _refuse_other_model(job: Job, facts: Mapping[str, Any]) -> None:
    """Equal shapes do not make equal models: rotary base, window, experts per token count too."""
    now, then = dataclasses.asdict(job.model), facts["model"]
    different = [name for name in now if name not in _FREE and name in then and then[name] != now[name]]
    if different:
        found = ", ".join(f"{name} {then[name]}" for name in different)
        expected = ", ".join(f"{name} {now[name]}" for name in different)
        raise CheckpointError(
            f"the checkpoint holds another model: it has {found}, this run {expected}; "
            f"change these flags, or --resume_from_checkpoint"
        )
