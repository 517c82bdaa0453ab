"""Time of a training beside its steps: start, compilation, validations, copies and writes of checkpoints.

Seconds come from the plan's own bytes and step time over stated speeds; what nobody measured is an assumption, and
every page that uses it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..optim.replan import reserve_hours, steps_that_fit
from ..units import format_seconds
from .bytes import state_bytes
from .job import Job, sizes_of
from .steps import communication, host_bytes_per_second, recomputed_share

# Assumptions, on a cluster: processes up and torch imported from a shared disk, the network joined, weights made and
# the rehearsal's first batches; the same of a small model on cores at hand; and blocks compiled, where they are.
START_SECONDS = 120.0
START_SECONDS_ON_CPU = 10.0
COMPILE_SECONDS = 120.0
# Of one node to a shared file system or S3, in 10^9 bytes a second; an assumption: measure with `hypershard doctor`.
DISK_GB_PER_SECOND = 1.0
_PROMPT_TOKENS = 32  # of a text written at a validation; an assumption where prompts are conversations
_PUBLISHED_BYTES = 2  # of a weight in a published model, which is in bfloat16


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds beside the steps: `once` in a run, and on average beside `each_step`; with what is assumed for them."""

    once: Mapping[str, float]
    each_step: Mapping[str, float]
    assumptions: tuple[str, ...]

    @property
    def once_seconds(self) -> float:
        return sum(self.once.values())

    @property
    def each_step_seconds(self) -> float:
        return sum(self.each_step.values())


@dataclass(frozen=True, kw_only=True)
class HoursWindow:
    """What of a training fits into --max_hours: `num_steps`, and `step_seconds` with what validations and saves add."""

    max_hours: float
    reserve_hours: float
    overheads: Overheads
    step_seconds: float
    num_steps: int

    def __str__(self) -> str:
        return (
            f"{self.num_steps:,} steps fit into {self.max_hours:g} h less {self.reserve_hours:g} h in reserve and "
            f"{format_seconds(self.overheads.once_seconds)} of {', '.join(self.overheads.once)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain values; `num_steps` are those that fit."""
        return {
            "max_hours": self.max_hours,
            "reserve_hours": self.reserve_hours,
            "num_steps": self.num_steps,
            "once_seconds": dict(self.overheads.once),
            "each_step_seconds": dict(self.overheads.each_step),
            "assumptions": list(self.overheads.assumptions),
            "text": str(self),
        }


def hours_window(job: Job, *, max_hours: float, step_seconds: float) -> HoursWindow:
    """How many steps of `step_seconds` fit into `max_hours` less the reserve, which `train` keeps too."""
    beside = overheads(job, step_seconds=step_seconds)
    reserve = reserve_hours(max_hours)
    whole_step = step_seconds + beside.each_step_seconds
    return HoursWindow(
        max_hours=max_hours,
        reserve_hours=reserve,
        overheads=beside,
        step_seconds=whole_step,
        num_steps=steps_that_fit(seconds=(max_hours - reserve) * 3600 - beside.once_seconds, step_seconds=whole_step),
    )


def overheads(job: Job, *, step_seconds: float) -> Overheads:
    """What `job` takes besides its steps of `step_seconds`; the settings say how often it validates and saves."""
    start = START_SECONDS if job.has_gpus else START_SECONDS_ON_CPU
    write = _write_seconds(job)
    validation = _validation_seconds(job, step_seconds) + _texts_seconds(job, step_seconds)
    freq = job.train.validation_freq
    once = {
        "start": start,
        "compilation": COMPILE_SECONDS * job.parallel.compile,
        "loading weights": _load_seconds(job),
        "last validation": validation,
        "final save": write,
    }
    each_step = {"validations": validation / freq if freq else 0.0, "saves": _save_seconds(job, step_seconds, write)}
    return Overheads(
        once={name: seconds for name, seconds in once.items() if seconds},
        each_step={name: seconds for name, seconds in each_step.items() if seconds},
        assumptions=(
            f"start takes {start:g} s"
            + (f", compilation {COMPILE_SECONDS:g} s" if job.parallel.compile else "")
            + f"; each node reads and writes checkpoints at {DISK_GB_PER_SECOND:g} GB/s",
        ),
    )


def _write_seconds(job: Job) -> float:
    """One checkpoint to every durable tier, each node its part."""
    checkpoint = job.checkpoint
    num_tiers = int(checkpoint.checkpoint_freq != 0)
    num_tiers += int(checkpoint.s3_tier_base_path is not None and checkpoint.s3_checkpointing_freq != 0)
    return num_tiers * state_bytes(job) / job.num_nodes / (DISK_GB_PER_SECOND * 1e9)


def _load_seconds(job: Job) -> float:
    """Weights that are there before: a published model, which each node reads whole, or a checkpoint of one's own."""
    if job.train.init_from == "scratch":
        return 0.0
    is_resumed = job.train.init_from == "resume"
    num_bytes = state_bytes(job) / job.num_nodes if is_resumed else _PUBLISHED_BYTES * sizes_of(job.model).total
    return num_bytes / (DISK_GB_PER_SECOND * 1e9)


def _validation_seconds(job: Job, step_seconds: float) -> float:
    sequences = job.data.val_batch_size or job.data.train_batch_size
    micro_seconds = step_seconds / job.accumulation * sequences / job.data.train_batch_size
    return job.train.validation_batches * micro_seconds * (1 + job.has_reference) * _forward_share(job)


def _forward_share(job: Job) -> float:
    """Of a micro-step's FLOPs one forward's: backward has twice as many, or beside frozen weights as many."""
    backward = 1 if job.has_adapters else 2
    return 1 / (1 + job.has_reference + recomputed_share(job) + backward)


def _texts_seconds(job: Job, step_seconds: float) -> float:
    """A forward for each token of --validation_texts, of as many rows as a validation batch has at most.

    Each takes as long as its tokens do in training, but no less than gathering the blocks or reading the weights does.
    """
    train, data = job.train, job.data
    if not train.validation_texts:
        return 0.0
    rows_of_rank = -(-train.validation_texts // job.num_gpus)
    num_rows = min(data.val_batch_size or data.train_batch_size, rows_of_rank)
    width = min(_PROMPT_TOKENS + train.validation_text_tokens, job.model.max_context_width)
    computing = step_seconds / job.accumulation * _forward_share(job) * num_rows * width / job.micro_tokens
    gathering = 0.0
    if job.parallel.sharding_strategy in ("full", "hybrid"):
        # A micro-step gathers the blocks so often, and reduces in float32 what is trained: adapters are few.
        passes = 2 + job.has_reference + (0 if job.has_adapters else 4 / job.number_bytes)
        gathering = communication(job).hidden / passes
    reading = job.gathered.total / (job.instance.gpu.memory_tb_per_second * 1e12)
    forward = max(computing, gathering, reading)
    return -(-rows_of_rank // num_rows) * min(train.validation_text_tokens, width) * forward


def _save_seconds(job: Job, step_seconds: float, write_seconds: float) -> float:
    """Of each step: the copies to host memory that saves begin with; the writing too where nothing runs beside it.

    Frequencies by 'auto' are chosen so that they cost little, and are left out.
    """
    checkpoint = job.checkpoint
    copy = state_bytes(job) / job.shard_degree / host_bytes_per_second(job)
    durable = copy if checkpoint.async_checkpointing else copy + write_seconds
    s3_freq = checkpoint.s3_checkpointing_freq if checkpoint.s3_tier_base_path else None
    local_freq = checkpoint.local_checkpointing_freq if checkpoint.local_tier_dir else None
    saves = (
        (checkpoint.in_memory_checkpointing_freq, copy),
        (local_freq, copy),
        (checkpoint.checkpoint_freq, durable),
        (s3_freq, durable),
    )
    seconds = sum(cost / freq for freq, cost in saves if isinstance(freq, int) and freq)
    if checkpoint.checkpoint_minutes:
        seconds += durable * step_seconds / (60 * checkpoint.checkpoint_minutes)
    return seconds
