"""Go on from a checkpoint, and refuse or name what has changed since."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.schema import AdapterConfig, LearningConfig
from ..errors import CheckpointError
from ..log import logger
from ..models.family import family_of
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


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or with `resume` after the newest valid checkpoint in `source`.

    `source` None means the run's own tiers; with `required` a run without a checkpoint is an error. `restart_data`
    allows other data than the checkpoint's, from their beginning.
    """

    resume: bool = False
    source: str | None = None
    required: bool = False
    restart_data: bool = False


def restore(job: Job, start: Start) -> Progress:
    """Load the checkpoint that `start` means into the job and return its counters, or those of a new run.

    Raises CheckpointError for another model's, or when one is required and there is none.
    """
    if not start.resume:
        return Progress()
    facts = job.checkpoints.restore(job.tensors(), source=start.source)
    if facts is None:
        if start.required:
            raise CheckpointError(
                f"found no checkpoint in {start.source or 'any tier'}, and --init_from=resume or --eval_only "
                f"needs one; name another --resume_from_checkpoint"
            )
        logger.info("no checkpoint to go on from; starting at step 0")
        return Progress()
    _refuse_other_model(job, facts)
    _refuse_other_learning(job, facts)
    _refuse_other_adapters(job, facts)
    progress = progress_from(facts)
    set_step_count(job.optimizer, progress.optimizer_steps)
    if facts["samples_per_step"] != job.samples_per_step:
        logger.warning(
            f"a step was {facts['samples_per_step']} sequences and is now {job.samples_per_step}; to keep it, change "
            f"--train_batch_size or --gradient_accumulation_steps. No sample is lost or repeated either way"
        )
    progress = _restore_data(job, facts, progress, anew=start.restart_data)
    logger.info(f"going on after step {progress.step} ({progress.tokens:,} tokens seen)")
    return progress


def _restore_data(job: Job, facts: Mapping[str, Any], progress: Progress, *, anew: bool) -> Progress:
    """Go on in the data where the checkpoint stood, or (`anew`) at the beginning of data that are others now."""
    now, then = job.data.identity, facts["data"]
    changed = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in now if then.get(name) != now[name]]
    if not changed:
        job.data.restore(facts)
        return progress
    if not anew:
        raise CheckpointError(
            f"the data are not those the checkpoint was trained on ({'; '.join(changed)}), so nobody knows which "
            f"samples come next; give the same --dataset and flags, or --restart_data=1 to read the new data from "
            f"their beginning"
        )
    logger.warning(f"other data than the checkpoint's ({'; '.join(changed)}): reading starts at their beginning")
    return dataclasses.replace(progress, samples=0)


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


def _refuse_other_learning(job: Job, facts: Mapping[str, Any]) -> None:
    """Another loss's moments and lowest validation mean nothing here, and a reference must be what it was."""
    now, then = dataclasses.asdict(job.learning), dataclasses.asdict(LearningConfig(**facts.get("learning", {})))
    different = [f"--{name}={then[name]} (this run: {now[name]})" for name in now if then[name] != now[name]]
    if different:
        raise CheckpointError(
            f"the checkpoint was trained with {', '.join(different)}; give the same, or start anew from what "
            f"`hypershard checkpoint export` makes of it, with --init_from"
        )


def _refuse_other_adapters(job: Job, facts: Mapping[str, Any]) -> None:
    """Adapters are worth something only beside the weights they were trained beside, and counted as they were then."""
    if job.base is None:
        return
    now, then = dataclasses.asdict(job.adapters), dataclasses.asdict(AdapterConfig(**facts["adapters"]))
    flags = [
        f"--{name}={then[name]} (this run: {now[name]})"
        for name in ("lora_alpha", "lora_rslora", "bnb_quant_type", "bnb_double_quant")
        if then[name] != now[name]
    ]
    if flags:
        raise CheckpointError(f"the checkpoint's adapters were trained with {', '.join(flags)}; give the same")
    base, sums = facts["base"], zip(facts["base"]["bit_sums"], job.base.bit_sums, strict=True)
    names = [spec.name for spec in family_of(job.model.model_type).parameters(job.model)]
    different = [name for name, (one, other) in zip(names, sums, strict=True) if one != other]
    if different:
        raise CheckpointError(
            f"the checkpoint's adapters were trained beside other weights, those of --init_from={base['init_from']} as "
            f"they were then: in --init_from={job.base.init_from} {different[0]} has other values, as have "
            f"{len(different) - 1} more; give the model of then, unchanged"
        )
