"""The search against trying everything, and what it says of what it refuses."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import pytest
from tests.plan_jobs import job_of as job

from hypershard.catalog.instances import Instance, Price, instance, price
from hypershard.errors import ConfigError
from hypershard.plan.calibration.calibration import calibrate
from hypershard.plan.estimate import memory_of, plan
from hypershard.plan.job import Job
from hypershard.plan.search.fit import OPTIONS, STRATEGIES, TIGHT_HANDICAP
from hypershard.plan.search.result import Candidate, SearchResult, as_dict
from hypershard.plan.search.search import Space, search
from hypershard.plan.steps import step_time

STEPS = 1000
SMALL = ("g5.12xlarge", "g6e.2xlarge", "p5.4xlarge", "p4d")


def listed(row: Instance) -> Price | None:
    return price(row, "ec2", prices_file=None)


def space_of(names: Sequence[str], counts: Sequence[int], *held: str) -> Space:
    return Space(instances=tuple(instance(name) for name in names), node_counts=tuple(counts), held=frozenset(held))


def found(planned: Job, space: Space, **asked: Any) -> SearchResult:
    return search(planned, space, **{"num_steps": STEPS, "price": listed, "deadline_hours": None, **asked})


def everything(planned: Job, space: Space) -> Iterator[tuple[Job, str, float]]:
    """All jobs of a space that run, with verdict and seconds of a step."""
    for row, count in itertools.product(space.instances, space.node_counts):
        there = dataclasses.replace(planned, instance=row, num_nodes=count)
        sequences = (planned.data.global_batch_tokens or 0) // planned.model.max_context_width
        if sequences % there.num_gpus:
            continue
        each = sequences // there.num_gpus
        sizes = [size for size in range(1, each + 1) if each % size == 0]
        for strategy, *values, size in itertools.product(STRATEGIES, *OPTIONS.values(), sizes):
            settings = {"sharding_strategy": strategy, **dict(zip(OPTIONS, values, strict=True))}
            one = dataclasses.replace(
                there,
                parallel=dataclasses.replace(there.parallel, **settings),
                data=dataclasses.replace(there.data, train_batch_size=size),
            )
            verdict = memory_of(one).verdict
            if verdict != "does not fit":
                yield one, verdict, step_time(one).seconds


@pytest.mark.parametrize(
    ("model", "sequences", "names"),
    [("llama3_8b", 512, SMALL), ("gpt2_1_36b", 96, SMALL), ("mixtral_8x7b", 256, ("p4de", "p5en", "g6e.48xlarge"))],
)
def test_nothing_in_a_small_space_beats_the_winners(model: str, sequences: int, names: Sequence[str]) -> None:
    context = 2048 if model == "gpt2_1_36b" else 8192
    planned = job(model, max_context_width=context, global_batch_tokens=sequences * context)
    space = space_of(names, (1, 8))
    tried = list(everything(planned, space))
    result = found(planned, space)
    best: dict[tuple[str, int], dict[str, float]] = {}
    for one, verdict, seconds in tried:
        place = best.setdefault((one.instance.name, one.num_nodes), {})
        place[verdict] = min(seconds, place.get(verdict, seconds))
    assert len(best) >= 3 and any("tight" in place for place in best.values())
    kept: dict[tuple[str, int], dict[str, float]] = {}
    for one in result.candidates:
        kept.setdefault((one.job.instance.name, one.job.num_nodes), {})[one.verdict] = one.step.seconds
    for place, seconds in best.items():
        if "fits" in seconds and seconds.get("tight", 0.0) * TIGHT_HANDICAP >= seconds["fits"]:
            del seconds["tight"]  # not worth its risk
        assert kept[place] == seconds
    assert set(kept) == set(best)

    def hours(entry: tuple[Job, str, float]) -> float:
        return entry[2] * STEPS / 3600 * (TIGHT_HANDICAP if entry[1] == "tight" else 1.0)

    def dollars(entry: tuple[Job, str, float]) -> float:
        hourly = listed(entry[0].instance)
        assert hourly is not None
        return hours(entry) * entry[0].num_nodes * hourly.dollars_per_hour

    assert result.fastest is not None and result.cheapest is not None
    fastest, cheapest = min(tried, key=hours), min(tried, key=dollars)
    assert result.fastest.step.seconds == pytest.approx(fastest[2])
    assert result.fastest.verdict == fastest[1]
    assert result.cheapest.dollars == pytest.approx(dollars((cheapest[0], "fits", cheapest[2])))


def test_every_candidate_trains_on_the_same_batch() -> None:
    planned = job("llama3_8b", global_batch_tokens=48 * 8192)
    result = found(planned, space_of(("g6e.12xlarge", "p4d", "p5", "p5en"), (1, 2, 4, 8)))
    assert len(result.candidates) > 8
    for one in result.candidates:
        assert one.job.step_tokens == 48 * 8192 == one.step.tokens
        assert one.job.model == planned.model and one.job.checkpoint == planned.checkpoint
        assert one.verdict == memory_of(one.job).verdict and one.step == step_time(one.job)
        assert one.hours == pytest.approx(STEPS * one.step.seconds / 3600)
        assert one.price is not None
        assert one.dollars == pytest.approx(one.hours * one.job.num_nodes * one.price.dollars_per_hour)
    left_out = {one.instance.family: one.node_counts for one in result.refusals if one.closest is None}
    assert left_out == {"g6e": (8,), "p4d": (4, 8), "p5": (4, 8), "p5en": (4, 8)}
    assert all("48 sequences do not divide" in one.reason for one in result.refusals if one.closest is None)


def test_what_is_tight_wins_by_more_than_its_handicap_alone() -> None:
    result = found(job("llama3_8b", global_batch_tokens=2**22), space_of(("p5", "p4de"), (4, 8)))
    safe = [one for one in result.candidates if one.verdict == "fits"]
    tight = [one for one in result.candidates if one.verdict == "tight"]
    assert safe and tight
    for one in tight:
        assert all(one.step.seconds * TIGHT_HANDICAP < other.step.seconds for other in safe if _at(other) == _at(one))
    for winner, cost in ((result.fastest, lambda one: one.hours), (result.cheapest, lambda one: one.dollars)):
        assert winner is not None
        room = TIGHT_HANDICAP if winner.verdict == "tight" else 1.0
        assert all(cost(winner) * room <= cost(other) for other in safe)
    assert result.cheapest is not None and result.cheapest.verdict == "tight"
    beside = result.winners["cheapest_that_fits"]
    assert beside.verdict == "fits" and beside.dollars == min(one.dollars for one in safe)
    assert set(result.winners) <= {"fastest", "fastest_that_fits", "cheapest", "cheapest_that_fits"}


def _at(one: Candidate) -> tuple[str, int]:
    return one.job.instance.name, one.job.num_nodes


def test_the_front_is_what_nothing_beats_in_both() -> None:
    result = found(job("llama3_8b", global_batch_tokens=2**20), space_of((*SMALL, "p5", "p5e", "p5en"), (1, 2, 4, 8)))
    priced = [one for one in result.candidates if one.price is not None]
    assert 1 < len(result.front) < len(priced) < len(result.candidates)

    def beaten(one: Candidate) -> bool:
        mine = one.rank_by_time, one.rank_by_cost
        others = [(other.rank_by_time, other.rank_by_cost) for other in priced]
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others)

    assert all(beaten(one) != any(one is other for other in result.front) for one in priced)


def test_a_deadline() -> None:
    planned, space = job("llama3_8b", global_batch_tokens=2**20), space_of(("g6e.48xlarge", "p4d", "p5"), (1, 2, 4, 8))
    free = found(planned, space)
    assert free.fastest is not None and free.fastest.hours and free.cheapest is not None and free.cheapest.hours
    assert free.cheapest_in_time is None and free.nearest_miss is None
    deadline = (free.fastest.hours + free.cheapest.hours) / 2
    result = found(planned, space, deadline_hours=deadline)
    in_time = [one for one in result.candidates if (one.hours or 0) <= deadline]
    assert result.cheapest_in_time is not None and 0 < len(in_time) < len(result.candidates)
    assert result.cheapest_in_time.rank_by_cost == min(one.rank_by_cost for one in in_time)
    missed = found(planned, space, deadline_hours=free.fastest.hours * 0.9)
    assert missed.cheapest_in_time is None and missed.nearest_miss is not None
    assert missed.nearest_miss.hours == free.fastest.hours
    with pytest.raises(ConfigError, match="--deadline=5"):
        found(planned, space, num_steps=None, deadline_hours=5.0)


def test_an_unknown_price_can_be_fastest_and_never_cheapest() -> None:
    planned, space = job("llama3_8b", global_batch_tokens=2**19), space_of(("p5e", "p4d"), (1, 2))
    result = found(planned, space, deadline_hours=1000.0)
    assert result.fastest is not None and result.fastest.job.instance.family == "p5e"
    assert result.fastest.dollars is None and result.fastest.dollars_per_billion is None
    assert all(one.job.instance.family == "p4d" for one in (*result.front, *list(result.winners.values())[1:]))
    nothing = found(planned, space, price=lambda row: None)
    assert nothing.fastest is not None and nothing.cheapest is None and nothing.front == ()


def test_refusals_say_what_came_closest_and_what_would_do() -> None:
    result = found(job("llama3_1_70b", global_batch_tokens=2**22), space_of(("g5.48xlarge", "p5"), (1, 2, 8)))
    by_family = {one.instance.family: one for one in result.refusals}
    small, hosts = by_family["g5"], by_family["p5"]
    assert small.node_counts == (1, 2, 8) and small.fits_from is None and "a GPU's memory" in small.reason
    assert small.closest is not None and small.closest.job.parallel.cpu_offload
    assert small.closest.fit.least_bytes > small.closest.fit.usable_bytes
    assert hosts.node_counts == (1, 2) and hosts.fits_from == 8 and "checkpoint slots" in hosts.reason
    assert hosts.closest is not None and hosts.remedy == ("--in_memory_checkpointing_freq=0",)
    without = dataclasses.replace(hosts.closest.job.checkpoint, in_memory_checkpointing_freq=0)
    assert memory_of(dataclasses.replace(hosts.closest.job, checkpoint=without)).verdict == "fits"
    assert {one["instance"] for one in as_dict(result)["refused"]} == {"g5.48xlarge", "p5.48xlarge"}


def test_a_speed_nobody_knows_is_a_reason() -> None:
    result = found(job("llama3_2_1b", global_batch_tokens=2**18, bf16=False), space_of(("p5",), (1,)))
    assert result.fastest is None and result.candidates == ()
    assert "--peak_tflops_per_gpu" in result.refusals[0].reason


def test_calibrated_times_are_those_of_the_plan() -> None:
    ran = job("llama3_8b", "p5", 1, train_batch_size=2, activation_checkpointing="full")
    seconds = [2 * step_time(ran).seconds] * 20
    measured = calibrate(
        ran, run="first", step_seconds=seconds, memory_bytes=None, software="torch 9", today=date(2026, 11, 1)
    )
    space = space_of(("p5", "p4d"), (1, 2))
    result = found(job("llama3_8b", global_batch_tokens=2**19, max_steps=STEPS), space, calibrations=(measured,))
    assert {one.step.level.partition(" by ")[0] for one in result.candidates} == {"calibrated", "closed form"}
    for one in result.candidates:
        made = plan(
            one.job, price=one.price, dataset_tokens=None, tokens_per_second_per_gpu=None, calibrations=(measured,)
        )
        assert made.step == one.step and made.hours == pytest.approx(one.hours)
        assert made.cost.dollars == pytest.approx(one.dollars)


def test_held_settings_stay_and_a_wrong_one_is_a_reason() -> None:
    planned = job("llama3_8b", global_batch_tokens=2**19, sharding_strategy="hybrid", hybrid_shard_degree=16)
    result = found(planned, space_of(("p5",), (1, 2, 4), "sharding_strategy", "cpu_offload"))
    assert {_at(one)[1] for one in result.candidates} == {2, 4}
    assert {(one.job.parallel.sharding_strategy, one.job.shard_degree) for one in result.candidates} == {("hybrid", 16)}
    assert [one.node_counts for one in result.refusals if "--hybrid_shard_degree=16" in one.reason] == [(1,)]


def test_half_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="--global_batch_tokens=12288"):
        found(job("llama3_8b", global_batch_tokens=12288), space_of(("p5",), (1,)))
