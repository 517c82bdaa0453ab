"""Where and how to train: the fastest, the cheapest and the cheapest in time, over instances, nodes and settings.

The batch of a step, and with it the number of tokens in all, is held; so are context, precision and the model. Every
number is that of `estimate` for the same flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...catalog.instances import Instance, Price
from ...config.checks import check_attention
from ...errors import ConfigError
from ..calibration.calibration import Calibration, calibrated, installed_software
from ..dollars import cost
from ..estimate import find_remedy
from ..job import Job
from .fit import Misfit, Run, try_nodes
from .result import BILLION, THAT_FITS, Candidate, Refusal, SearchResult

NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where to look. Settings of SEARCHED that are named in `held` stay as they are."""

    instances: tuple[Instance, ...]
    node_counts: tuple[int, ...]
    held: frozenset[str]


def search(
    job: Job,
    space: Space,
    *,
    num_steps: int | None,
    price: Callable[[Instance], Price | None],
    deadline_hours: float | None,
    calibrations: Sequence[Calibration] = (),
) -> SearchResult:
    """Search `space` for ways to train `job`, whose instance, nodes and micro-batch are replaced.

    `job.data.global_batch_tokens` is the batch that is held. `num_steps` None: ranked by speed and by dollars for 10^9
    tokens. `price` is of one node and hour. `calibrations` scale times as in `estimate.plan`: what is fastest on given
    nodes is chosen by the closed form, and nodes are compared by what the calibrations make of it.

    Raises ConfigError for a batch that is no whole number of sequences, a deadline without steps, and an attention that
    GPUs do not have.
    """
    batch_tokens, context = job.data.global_batch_tokens, job.model.max_context_width
    if batch_tokens is None or batch_tokens % context:
        raise ConfigError(
            f"--global_batch_tokens={batch_tokens}: expected a multiple of --max_context_width={context}, whole "
            f"sequences in each step"
        )
    if deadline_hours is not None and num_steps is None:
        raise ConfigError(
            f"--deadline={deadline_hours:g}: how long the training takes is unknown; give --max_steps, or --epochs "
            f"with --dataset_tokens"
        )
    check_attention(job.model, job.parallel)
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, gradient_accumulation_steps=None))
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for instance in space.instances:
        found, refused = _search_instance(dataclasses.replace(job, instance=instance), space)
        listed = price(instance) if found else None
        candidates += [_candidate(run, listed, num_steps, calibrations) for run in found]
        refusals += refused
    candidates.sort(key=lambda one: (one.rank_by_time, one.job.num_gpus))
    winners = _winners(candidates, deadline_hours)
    missed = deadline_hours is not None and "cheapest_in_time" not in winners
    return SearchResult(
        step_tokens=batch_tokens,
        num_steps=num_steps,
        deadline_hours=deadline_hours,
        candidates=tuple(candidates),
        front=tuple(_front(candidates)),
        winners=winners,
        nearest_miss=next(_priced(candidates), None) if missed else None,
        refusals=tuple(refusals),
        num_places=len(space.instances) * len(space.node_counts),
    )


def _candidate(run: Run, price: Price | None, num_steps: int | None, calibrations: Sequence[Calibration]) -> Candidate:
    step = run.step
    if calibrations:
        step = calibrated(step, run.job, calibrations, software=installed_software())
    hours = None if num_steps is None else num_steps * step.seconds / 3600
    return Candidate(
        job=run.job,
        memory=run.memory,
        step=step,
        price=price,
        hours=hours,
        dollars=cost(run.job, price, hours=hours).dollars,
        dollars_per_billion=cost(run.job, price, hours=BILLION / step.tokens * step.seconds / 3600).dollars,
    )


def _priced(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    return (one for one in candidates if one.price is not None)


def _winners(candidates: Sequence[Candidate], deadline_hours: float | None) -> dict[str, Candidate]:
    """The best of each kind, and the best that fits where that is tight; `candidates` are sorted by time."""
    priced = sorted(_priced(candidates), key=lambda one: one.rank_by_cost)
    in_time = [one for one in priced if deadline_hours is not None and (one.hours or 0.0) <= deadline_hours]
    found = {}
    for role, among in (("fastest", candidates), ("cheapest", priced), ("cheapest_in_time", in_time)):
        if among:
            found[role] = among[0]
            fitting = next((one for one in among if one.verdict == "fits"), among[0])
            if fitting is not among[0]:
                found[role + THAT_FITS] = fitting
    return found


def _front(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Of candidates that are sorted by time: each that is cheaper than all that are faster."""
    least = float("inf")
    for one in sorted(_priced(candidates), key=lambda one: (one.rank_by_time, one.rank_by_cost)):
        if one.rank_by_cost < least:
            least = one.rank_by_cost
            yield one


# --- one instance


def _search_instance(job: Job, space: Space) -> tuple[list[Run], list[Refusal]]:
    """What runs on `job`'s instance, and why the rest does not."""
    batch_tokens, context = job.data.global_batch_tokens, job.model.max_context_width
    assert batch_tokens is not None
    runs: list[Run] = []
    undivided: list[int] = []
    misfits: list[Misfit] = []
    barred: dict[str, list[int]] = {}
    for num_nodes in space.node_counts:
        there = dataclasses.replace(job, num_nodes=num_nodes)
        if batch_tokens % (there.num_gpus * context):
            undivided.append(num_nodes)
            continue
        try:
            tried = try_nodes(there, held=space.held)
        except ConfigError as error:
            barred.setdefault(str(error), []).append(num_nodes)
            continue
        found = list(tried.runs())
        runs += found
        if not found and tried.closest is not None:
            misfits.append(tried.closest)
    refusals = [Refusal(instance=job.instance, node_counts=tuple(nodes), reason=why) for why, nodes in barred.items()]
    if undivided:
        reason = f"{batch_tokens // context:,} sequences do not divide over {job.instance.num_gpus} GPUs x nodes"
        refusals.append(Refusal(instance=job.instance, node_counts=tuple(undivided), reason=reason))
    if misfits:
        refusals.append(_too_small(misfits, runs))
    return runs, refusals


def _too_small(misfits: Sequence[Misfit], runs: Sequence[Run]) -> Refusal:
    """Node counts without enough memory, told by what came closest on any of them."""
    closest = min(misfits, key=lambda one: one.excess)
    fits_from = min((run.job.num_nodes for run in runs), default=None)
    remedy: tuple[str, ...] = ()
    # The host's memory may be short for the sake of checkpoints, which a search leaves as they are.
    if fits_from is None or closest.fit is closest.memory.host:
        found = find_remedy(closest.job)
        fits_from, remedy = fits_from or found.num_nodes, tuple(str(change) for change in found.changes)
    return Refusal(
        instance=closest.job.instance,
        node_counts=tuple(one.job.num_nodes for one in misfits),
        reason=f"{closest.fit.of} is too small: most of it is {closest.largest_term}",
        closest=closest,
        remedy=remedy,
        fits_from=fits_from,
    )
