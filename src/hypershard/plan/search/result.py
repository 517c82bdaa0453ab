"""What a search found: candidates, winners, the front of hours and dollars, and what was refused, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...catalog.instances import Instance, Price
from ..estimate import LEVEL, Memory
from ..job import Job
from ..steps import StepTime
from .fit import SEARCHED, TIGHT_HANDICAP, Misfit

BILLION = 10**9
THAT_FITS = "_that_fits"  # after a role: of those that fit, where the winner is tight


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run the training. Hours are None without a number of steps, dollars where the price is unknown too.

    `dollars_per_billion` is of 10^9 tokens.
    """

    job: Job
    memory: Memory
    step: StepTime
    price: Price | None
    hours: float | None
    dollars: float | None
    dollars_per_billion: float | None

    @property
    def verdict(self) -> str:
        return self.memory.verdict

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens / self.step.seconds

    @property
    def hours_per_billion(self) -> float:
        """Hours for 10^9 tokens."""
        return BILLION / self.tokens_per_second / 3600

    @property
    def _handicap(self) -> float:
        return TIGHT_HANDICAP if self.verdict == "tight" else 1.0

    @property
    def rank_by_time(self) -> float:
        """To compare by, less is better: every candidate trains on the same tokens."""
        return self.hours_per_billion * self._handicap

    @property
    def rank_by_cost(self) -> float:
        """As `rank_by_time`; only where the price is known."""
        assert self.dollars_per_billion is not None
        return self.dollars_per_billion * self._handicap


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An instance on such node counts, and why it is no candidate there.

    `closest` needs least over its memory of all that was tried, and fits with the flags of `remedy`, where such were
    found; None where memory is not the reason. `fits_from`: the fewest nodes that are enough, as far as that is known.
    """

    instance: Instance
    node_counts: tuple[int, ...]
    reason: str
    closest: Misfit | None = None
    remedy: tuple[str, ...] = ()
    fits_from: int | None = None


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Candidates, the fastest first: for each instance and nodes what fits, or is tight and that much faster.

    `winners`: those there are of fastest, cheapest, cheapest_in_time (within `deadline_hours`); where one of these is
    tight, the best that fits stands beside it, as fastest_that_fits for example. `nearest_miss`: the fastest, where
    nothing of known price is done by the deadline. `front`: those of known price that no other beats in both hours and
    dollars. `num_places`: instances x node counts.
    """

    step_tokens: int
    num_steps: int | None
    deadline_hours: float | None
    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    winners: Mapping[str, Candidate]
    nearest_miss: Candidate | None
    refusals: tuple[Refusal, ...]
    num_places: int

    @property
    def num_tokens(self) -> int | None:
        """Of the whole training; None where its length is unknown."""
        return None if self.num_steps is None else self.num_steps * self.step_tokens

    @property
    def fastest(self) -> Candidate | None:
        return self.winners.get("fastest")

    @property
    def cheapest(self) -> Candidate | None:
        return self.winners.get("cheapest")

    @property
    def cheapest_in_time(self) -> Candidate | None:
        return self.winners.get("cheapest_in_time")


# --- as values for programs


def settings_of(job: Job) -> dict[str, Any]:
    """What a search chose, by the names of flags, beside --instance and --nodes."""
    found = {name: getattr(job.parallel, name) for name in SEARCHED}
    return {**found, "train_batch_size": job.data.train_batch_size, "global_batch_tokens": job.data.global_batch_tokens}


def as_dict(result: SearchResult) -> dict[str, Any]:
    """The result as plain values for JSON; memory in bytes, every estimate with its level and band."""
    return {
        "level": LEVEL,
        "global_batch_tokens": result.step_tokens,
        "num_steps": result.num_steps,
        "deadline_hours": result.deadline_hours,
        "num_places": result.num_places,
        "winners": {name: candidate_dict(one) for name, one in result.winners.items()},
        "nearest_miss": None if result.nearest_miss is None else candidate_dict(result.nearest_miss),
        "front": [candidate_dict(one) for one in result.front],
        "candidates": [candidate_dict(one) for one in result.candidates],
        "refused": [_refusal_dict(one) for one in result.refusals],
    }


def candidate_dict(one: Candidate) -> dict[str, Any]:
    """A candidate as plain values."""
    gpu, host = one.memory.gpu, one.memory.host
    return {
        "instance": one.job.instance.name,
        "num_nodes": one.job.num_nodes,
        "num_gpus": one.job.num_gpus,
        **settings_of(one.job),
        "accumulation": one.job.accumulation,
        "verdict": one.verdict,
        "gpu": {"needed_bytes": gpu.needed_bytes, "usable_bytes": gpu.usable_bytes},
        "host": {"needed_bytes": host.needed_bytes, "usable_bytes": host.usable_bytes},
        "level": one.step.level,
        "band": one.step.band,
        "step_seconds": one.step.seconds,
        "tokens_per_second": one.tokens_per_second,
        "hours": one.hours,
        "dollars": one.dollars,
        "dollars_per_billion_tokens": one.dollars_per_billion,
        "price": None if one.price is None else str(one.price),
    }


def _refusal_dict(one: Refusal) -> dict[str, Any]:
    closest = None
    if one.closest is not None:
        fit = one.closest.fit
        closest = {
            "num_nodes": one.closest.job.num_nodes,
            **settings_of(one.closest.job),
            "of": fit.of,
            "least_bytes": fit.least_bytes,
            "usable_bytes": fit.usable_bytes,
        }
    return {
        "instance": one.instance.name,
        "node_counts": list(one.node_counts),
        "reason": one.reason,
        "closest": closest,
        "remedy": list(one.remedy),
        "fits_from": one.fits_from,
    }
