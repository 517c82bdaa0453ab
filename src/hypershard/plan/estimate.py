"""The closed-form plan of a job: memory with a verdict, time, dollars, what would make it fit, what is not known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..catalog.instances import Price
from ..config.checks import check_attention, check_world
from ..errors import ConfigError
from ..units import format_bytes
from . import bytes as memory
from .calibration.calibration import Calibration, calibrated, installed_software
from .dollars import Cost, cost
from .job import Job, Sizes, sizes_of
from .overheads import HoursWindow, hours_window
from .steps import LEVEL, StepTime, step_time

_MOST_NODES = 64
_MOST_CHANGES = 5


@dataclass(frozen=True)
class Change:
    """One flag and its value that alters a job; `section` is the part of the configuration it belongs to."""

    section: str
    flag: str
    value: Any

    def __str__(self) -> str:
        return f"--{self.flag}={int(self.value) if isinstance(self.value, bool) else self.value}"


@dataclass(frozen=True)
class Remedy:
    """Changes that make a job fit, few before many; empty: none was found. `num_nodes`: so many nodes would too."""

    changes: tuple[Change, ...]
    num_nodes: int | None

    def __str__(self) -> str:
        ways = []
        if self.changes:
            ways.append("with " + " ".join(str(change) for change in self.changes))
        if self.num_nodes is not None:
            ways.append(f"on {self.num_nodes} nodes as it is")
        return f"it fits {', or '.join(ways)}" if ways else "no change of flags makes it fit"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A GPU's memory moment by moment, a node's host memory, and whether both suffice."""

    moments: tuple[memory.Moment, ...]
    gpu: memory.Fit
    host_terms: tuple[memory.Term, ...]
    host: memory.Fit

    @property
    def verdict(self) -> str:
        return memory.worst_verdict(self.gpu, self.host)

    @property
    def dominant(self) -> memory.Term:
        """The largest term at the GPU's peak."""
        return max(memory.peak(self.moments).terms, key=lambda term: term.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the closed form says of a job. `step`, `hours` are None where they are unknown: see `unknown`.

    `hours_level` says whether the hours follow from the closed form's speed, a calibrated or a measured one. `window`:
    what of the training fits into --max_hours; None without it, or where the time is unknown.
    """

    job: Job
    sizes: Sizes
    flops_per_token: float
    memory: Memory
    remedy: Remedy | None
    step: StepTime | None
    num_steps: int | None
    window: HoursWindow | None
    hours: float | None
    hours_level: str
    cost: Cost
    unknown: tuple[str, ...]

    @property
    def most_hours(self) -> float | None:
        """`hours` with the band added; a run in a window has ended, saved, when that is over."""
        if self.hours is None or self.step is None:
            return None
        most = self.hours * (1 + self.step.band)
        return most if self.window is None else min(most, self.window.max_hours)


def plan(
    job: Job,
    *,
    price: Price | None,
    dataset_tokens: int | None,
    tokens_per_second_per_gpu: float | None,
    calibrations: Sequence[Calibration] = (),
) -> Plan:
    """The plan of `job` at `price` per node and hour.

    `dataset_tokens`: of one pass over the data, for --epochs. `calibrations`: what runs measured; the nearest scales
    the time. `tokens_per_second_per_gpu`: a measured speed that goes before the estimated one, for the hours. With
    --max_hours no more steps than fit, and as many where nothing else says how many. Raises ConfigError for settings
    that do not go with these GPUs or their number.
    """
    check_job(job)
    unknown = []
    needed = memory_of(job)
    try:
        step = calibrated(step_time(job), job, calibrations, software=installed_software())
    except ConfigError as error:
        step, unknown = None, [f"time: {error}"]
    speed = tokens_per_second_per_gpu or (step.tokens_per_second_per_gpu if step else None)
    step_seconds = None if speed is None else job.step_tokens / job.num_gpus / speed
    num_steps, window = _steps_and_window(job, dataset_tokens, step_seconds)
    if num_steps is None:
        unknown.append(
            "hours and dollars: give --max_steps, --max_hours, or for --epochs the size of the data, by "
            "--num_samples and --tokens_per_sample, or --dataset_tokens"
        )
    hours = None if num_steps is None or step_seconds is None else num_steps * step_seconds / 3600
    if price is None:
        unknown.append(f"dollars: the catalog has no price of {job.instance.name} for this service; --prices_file")
    unknown.append("not in the hours: start, validation, checkpoint stalls, restarts, waiting for data")
    if step is not None:
        unknown += [f"assumed: {text}" for text in step.assumptions]
    return Plan(
        job=job,
        sizes=sizes_of(job.model),
        flops_per_token=job.flops.total,
        memory=needed,
        remedy=find_remedy(job) if needed.verdict == "does not fit" else None,
        step=step,
        num_steps=num_steps,
        window=window,
        hours=hours,
        hours_level="measured speed" if tokens_per_second_per_gpu else step.level if step else LEVEL,
        cost=cost(job, price, hours=hours),
        unknown=tuple(unknown),
    )


def compiled_share(job: Job) -> float | None:
    """Share of a step's time that a job in NF4 takes with --compile=1, which dequantises in one kernel; by closed form.

    None where that does not help: not in NF4, compiled already, without GPUs, or of an unknown time.
    """
    if not job.num_unpacked or job.parallel.compile or not job.has_gpus:
        return None
    try:
        now, then = (step_time(one).seconds for one in (job, changed(job, (Change("parallel", "compile", True),))))
    except ConfigError:
        return None
    return then / now


def check_job(job: Job) -> None:
    """Refuse settings that do not go with the job's GPUs or their number. Raises ConfigError, as `train` would."""
    check_world(job.parallel, world_size=job.num_gpus, local_world_size=job.instance.num_gpus)
    if job.has_gpus:
        check_attention(job.model, job.parallel)


def _steps_and_window(
    job: Job, dataset_tokens: int | None, step_seconds: float | None
) -> tuple[int | None, HoursWindow | None]:
    """Steps of the run, at least one; and what of it fits into --max_hours."""
    asked, hours = num_steps_of(job, dataset_tokens), job.train.max_hours
    if hours is None or step_seconds is None:
        return asked, None
    window = hours_window(job, max_hours=hours, step_seconds=step_seconds)
    fitting = max(1, window.num_steps)
    return fitting if asked is None else min(asked, fitting), window


def memory_of(job: Job) -> Memory:
    """The job's memory and verdicts."""
    moments, host = memory.gpu_moments(job), memory.host_terms(job)
    return Memory(moments=moments, gpu=memory.gpu_fit(job, moments), host_terms=host, host=memory.host_fit(job, host))


def num_steps_of(job: Job, dataset_tokens: int | None) -> int | None:
    """As train/setup.py: --max_steps or --epochs, whichever ends first; one epoch when neither is given."""
    limits = [] if job.train.max_steps is None else [job.train.max_steps]
    epochs = job.data.epochs or (None if limits else 1)
    if epochs is not None and dataset_tokens is not None:
        limits.append(max(1, epochs * dataset_tokens // job.step_tokens))
    return min(limits, default=None)


def why_not(made: Plan) -> str:
    """Why a job that does not fit does not, and what would make it fit."""
    found = made.memory
    worst = max(found.gpu, found.host, key=lambda fit: fit.least_bytes / fit.usable_bytes)
    needed = f"{format_bytes(worst.needed_bytes)} are needed and {format_bytes(worst.usable_bytes)} are there"
    what = f", most of it {found.dominant.name}" if worst is found.gpu else ""
    return f"the plan says that this does not fit: of {worst.of} {needed}{what}; {made.remedy}"


# --- what would make it fit


def find_remedy(job: Job) -> Remedy:
    """The fewest changes of flags with which `job` fits, found by trying; among as many, those that cost least time.

    Sets that fit go before such that are tight. Apart from these: the fewest nodes, of powers of two, that fit.
    """
    best: tuple[Change, ...] = ()
    for changes in _sets(job):
        verdict = memory_of(changed(job, changes)).verdict
        if verdict == "fits":
            best = changes
            break
        if verdict == "tight" and not best:
            best = changes
    return Remedy(best, _enough_nodes(job))


def changed(job: Job, changes: tuple[Change, ...]) -> Job:
    """`job` with these flags given."""
    for change in changes:
        section = dataclasses.replace(getattr(job, change.section), **{change.flag: change.value})
        job = dataclasses.replace(job, **{change.section: section})
    return job


def _sets(job: Job) -> Iterator[tuple[Change, ...]]:
    """Sets of changes, small ones first, that give no flag twice."""
    candidates = _candidates(job)
    for count in range(1, _MOST_CHANGES + 1):
        for changes in itertools.combinations(candidates, count):
            if len({change.flag for change in changes}) == count:
                yield changes


def _candidates(job: Job) -> list[Change]:
    """Changes that save memory and leave what is learnt alone, the cheapest in time first."""
    parallel, checkpoint = job.parallel, job.checkpoint
    found = []
    if parallel.sharding_strategy != "full" and job.num_gpus > 1:
        found.append(Change("parallel", "sharding_strategy", "full"))
    kinds = ("none", "selective", "full")
    for kind in kinds[kinds.index(parallel.activation_checkpointing) + 1 :]:
        found.append(Change("parallel", "activation_checkpointing", kind))
    if checkpoint.in_memory_checkpointing_freq:
        found.append(Change("checkpoint", "in_memory_checkpointing_freq", 0))
    if checkpoint.async_checkpointing:
        found.append(Change("checkpoint", "async_checkpointing", False))
    # With --global_batch_tokens more micro-steps make up for it; without, the batch of a step is smaller.
    if job.data.train_batch_size > 1:
        found.append(Change("data", "train_batch_size", 1))
    if not parallel.offload_activations:
        found.append(Change("parallel", "offload_activations", True))
    if not parallel.cpu_offload:
        found.append(Change("parallel", "cpu_offload", True))
    return found


def _enough_nodes(job: Job) -> int | None:
    """The least power-of-two multiple of the nodes that fits with the flags as they are; None: not up to 64."""
    num_nodes = 2 * job.num_nodes
    while num_nodes <= _MOST_NODES:
        wider = dataclasses.replace(job, num_nodes=num_nodes)
        try:
            if memory_of(wider).verdict == "fits":
                return num_nodes
        except ConfigError:  # --global_batch_tokens does not divide over so many GPUs
            return None
        num_nodes *= 2
    return None


# --- as values for programs


def as_dict(made: Plan) -> dict[str, Any]:
    """The plan as plain values for JSON; memory in bytes, time in seconds, every estimate with its level and band."""
    job, step = made.job, made.step
    return {
        "level": LEVEL,
        "model": {
            "model_type": job.model.model_type,
            "vocab_size": job.model.vocab_size,
            "parameters": made.sizes.total,
            "active_parameters": made.sizes.active,
            "trained_parameters": job.trained.total,
            "flops_per_token": made.flops_per_token,
        },
        "job": {
            "instance": job.instance.name,
            "gpu": job.instance.gpu.name,
            "num_nodes": job.num_nodes,
            "num_gpus": job.num_gpus,
            "shard_degree": job.shard_degree,
            "accumulation": job.accumulation,
            "step_tokens": job.step_tokens,
            "attention": job.attention_path,
        },
        "memory": _memory_dict(made.memory, made.remedy),
        "time": None
        if step is None
        else {
            "level": step.level,
            "band": step.band,
            "step_seconds": step.seconds,
            "parts_seconds": dict(step.parts),
            "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
            "mfu": step.mfu,
        },
        "num_steps": made.num_steps,
        "window": None if made.window is None else made.window.as_dict(),
        "hours": made.hours,
        "hours_level": made.hours_level,
        "cost": {
            "dollars": made.cost.dollars,
            "formula": made.cost.formula,
            "dollars_per_node_hour": made.cost.price.dollars_per_hour if made.cost.price else None,
            "price": str(made.cost.price) if made.cost.price else "unknown",
            "checkpoint_bytes": made.cost.checkpoint_bytes,
            "storage_dollars_per_month": made.cost.storage_dollars_per_month,
        },
        "unknown": list(made.unknown),
    }


def _memory_dict(found: Memory, remedy: Remedy | None) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "band": memory.BAND,
        "verdict": found.verdict,
        "dominant": found.dominant.name,
        "moments_bytes": {one.name: {term.name: term.num_bytes for term in one.terms} for one in found.moments},
        "gpu": {
            "needed_bytes": found.gpu.needed_bytes,
            "reserved_bytes": memory.reserved_bytes(found.moments),
            "usable_bytes": found.gpu.usable_bytes,
        },
        "host_bytes": {term.name: term.num_bytes for term in found.host_terms},
        "host": {"needed_bytes": found.host.needed_bytes, "usable_bytes": found.host.usable_bytes},
        "remedy": None
        if remedy is None
        else {"flags": [str(change) for change in remedy.changes], "num_nodes": remedy.num_nodes},
    }
