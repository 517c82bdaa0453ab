"""The fastest way to run a job on given nodes at a given batch: sharding, recomputation, offload, micro-batch.

What is tried changes memory and time and nothing that is learnt. Not all of it is tried. Three orders, which a test
holds by trying everything, leave out what cannot win:
- time: smaller micro-batches never make a step faster, nor does offloading, nor recomputing where nothing is offloaded;
- memory: of several micro-steps, larger ones never need less (a single one may: it carries no gradients over);
- a GPU's memory: recomputing and offloading never need more of it. A node's host memory they may.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ...config.checks import check_world
from ...config.schema import SETTINGS, ParallelConfig
from ..bytes import Fit
from ..estimate import Memory, memory_of
from ..job import Job
from ..steps import StepTime, step_time

# A tight job's time is optimistic: its allocator gives memory of one stream back and asks for it on another. By how
# much nobody knows (README, 30B). So this is no estimate: it lets what fits win wherever it is nearly as good, and a
# tight winner is shown with the best that fits beside it.
TIGHT_HANDICAP = 1.03

# What is tried, the cheapest in time first.
STRATEGIES: tuple[str, ...] = SETTINGS["sharding_strategy"][1].metadata["choices"]
OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation_checkpointing": ("none", "selective", "full"),
    "offload_activations": (False, True),
    "cpu_offload": (False, True),
}
SEARCHED = ("sharding_strategy", *OPTIONS)


@dataclass(frozen=True)
class Run:
    """A job that can run: its memory and its time."""

    job: Job
    memory: Memory
    step: StepTime


@dataclass(frozen=True)
class Misfit:
    """A job that does not fit, with what it needs."""

    job: Job
    memory: Memory

    @property
    def fit(self) -> Fit:
        """Of the GPU or of the host, whichever is too small by more."""
        return max(self.memory.gpu, self.memory.host, key=_excess)

    @property
    def excess(self) -> float:
        """Least bytes over usable ones."""
        return _excess(self.fit)

    @property
    def largest_term(self) -> str:
        """What takes most of the memory that is too small."""
        if self.fit is self.memory.gpu:
            return self.memory.dominant.name
        return max(self.memory.host_terms, key=lambda term: term.num_bytes).name


def _excess(fit: Fit) -> float:
    return fit.least_bytes / fit.usable_bytes


@dataclass
class Tried:
    """What was found on these nodes: the fastest that fits, the fastest tight one, what came closest of the others."""

    fits: Run | None = None
    tight: Run | None = None
    closest: Misfit | None = None

    def runs(self) -> Iterator[Run]:
        """What fits; and what is tight, where it is faster by more than its handicap."""
        if self.fits is not None:
            yield self.fits
        if self.tight is not None and (
            self.fits is None or self.tight.step.seconds * TIGHT_HANDICAP < self.fits.step.seconds
        ):
            yield self.tight

    def beats(self, job: Job) -> bool:
        """Whether something that fits is as fast as `job`."""
        return self.fits is not None and step_time(job).seconds >= self.fits.step.seconds

    def memory(self, job: Job) -> Memory:
        """The job's memory; kept where it does not fit and comes closest so far."""
        needed = memory_of(job)
        if needed.verdict == "does not fit":
            misfit = Misfit(job, needed)
            if self.closest is None or misfit.excess < self.closest.excess:
                self.closest = misfit
        return needed

    def take(self, job: Job) -> str:
        """Keep `job` if it is the best so far; its verdict. Raises ConfigError where the GPU's peak is unknown."""
        needed = self.memory(job)
        if needed.verdict == "fits":
            self.fits = _faster(Run(job, needed, step_time(job)), self.fits)
        elif needed.verdict == "tight":
            self.tight = _faster(Run(job, needed, step_time(job)), self.tight)
        return needed.verdict


def _faster(run: Run, best: Run | None) -> Run:
    return run if best is None or run.step.seconds < best.step.seconds else best


def try_nodes(job: Job, *, held: Set[str]) -> Tried:
    """The fastest settings for `job`'s instance, nodes and --global_batch_tokens, whose sequences its GPUs must divide.

    Settings named in `held` stay as they are in `job`. Raises ConfigError where the GPU's peak is unknown, and for a
    held sharding that does not go with so many GPUs.
    """
    assert job.data.global_batch_tokens is not None
    each, rest = divmod(job.data.global_batch_tokens, job.model.max_context_width * job.num_gpus)
    assert rest == 0
    batches = [size for size in range(each, 0, -1) if each % size == 0]
    options = {name: values for name, values in OPTIONS.items() if name not in held}
    tried = Tried()
    for sharded in _strategies(job, held):
        _try_options(sharded, batches, options, tried)
    return tried


def _strategies(job: Job, held: Set[str]) -> Iterator[Job]:
    """`job` under each sharding that differs from those before it."""
    if "sharding_strategy" in held:
        check_world(job.parallel, world_size=job.num_gpus, local_world_size=job.instance.num_gpus)
        yield job
        return
    for strategy in STRATEGIES:
        sharded = _with(job, sharding_strategy=strategy)
        # On one GPU there is nothing to share out, and on one node hybrid's groups are the whole.
        if strategy == "full" or (job.num_gpus > 1 and (strategy != "hybrid" or sharded.shard_degree < job.num_gpus)):
            yield sharded


def _try_options(job: Job, batches: Sequence[int], options: dict[str, tuple[Any, ...]], tried: Tried) -> None:
    """Take what is best of one sharding; `batches` are micro-batches, the largest first."""
    saving = _with(job, **{name: values[-1] for name, values in options.items()})
    edges = dict.fromkeys((batches[0], batches[-1]))
    if all(tried.memory(_batched(saving, size)).gpu.verdict == "does not fit" for size in edges):
        return
    closed: list[ParallelConfig] = []  # than which nothing that saves more is faster
    for values in itertools.product(*options.values()):
        chosen = _with(job, **dict(zip(options, values, strict=True)))
        if any(_saves_more(chosen.parallel, than=shut) for shut in closed):
            continue
        if _try_batches(chosen, batches, tried):
            closed.append(chosen.parallel)


def _saves_more(one: ParallelConfig, *, than: ParallelConfig) -> bool:
    """Whether `one` does all for memory that the other does, in no less time. Recomputing leaves less to offload."""
    kinds = OPTIONS["activation_checkpointing"]
    return (
        kinds.index(one.activation_checkpointing) >= kinds.index(than.activation_checkpointing)
        and one.offload_activations >= than.offload_activations
        and one.cpu_offload >= than.cpu_offload
        and (not than.offload_activations or one.activation_checkpointing == than.activation_checkpointing)
    )


def _try_batches(job: Job, batches: Sequence[int], tried: Tried) -> bool:
    """Take the largest micro-batch that fits. True: nothing that saves more memory can be faster."""
    for index, size in enumerate(batches):
        one = _batched(job, size)
        if tried.beats(one):
            return index == 0
        if tried.take(one) == "fits":
            return index == 0
        if index == 0 and len(batches) > 2 and tried.memory(_batched(job, batches[-1])).verdict == "does not fit":
            return False
    return False


def _batched(job: Job, size: int) -> Job:
    return dataclasses.replace(job, data=dataclasses.replace(job.data, train_batch_size=size))


def _with(job: Job, **parallel: Any) -> Job:
    return dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, **parallel))
