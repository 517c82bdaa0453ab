"""A run in a window of hours: its schedule laid over the steps that fit, the same on every rank and after a resume."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jobs import a_job, tiny
from tests.rank_pool import RankPool

from hypershard.distributed.process_group import World
from hypershard.metrics.on_track import Forecast
from hypershard.train.replan import first_course, lay_course
from hypershard.train.state import Course, Progress, progress_from


def courses(world: World, flags: str, cache_dir: Path) -> list[object]:
    """What a run does before its first step, after 25 that took 2 s each, and what its checkpoint says of it.

    Each rank has a clock of its own, and rank 0's counts.
    """
    with a_job(world, flags, cache_dir) as job:
        planned = dataclasses.replace(job, forecast=Forecast(step_seconds=1.0))
        before = first_course(planned, Progress())
        done = dataclasses.replace(before, step=25, seconds=50.0 + world.ranks.rank)
        after = lay_course(planned, done, step_seconds=2.0 + world.ranks.rank)
        again = progress_from(json.loads(json.dumps(job.facts(after))))
        noise = lay_course(planned, after, step_seconds=2.01)
        rates = [
            planned.learning_rate(dataclasses.replace(after, step=step)) for step in range(planned.last_step(after))
        ]
        rehearsed = first_course(job, Progress())
        assert first_course(job, after) == after, "a run that goes on keeps its course"
        wider = dataclasses.replace(planned, limits=dataclasses.replace(job.limits, max_seconds=3600.0))
        assert wider.last_step(first_course(wider, after)) == 1000, "in a wider window it is laid anew"
        return [before.course, after.course, again == after, noise == after, rates, rehearsed.course]


def test_the_schedule_ends_with_the_window(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    """0.1 hours less a twentieth are 342 s: 342 steps as planned; as measured, 25 and then 146 of 2 s."""
    flags = tiny(max_steps=1000, max_hours=0.1, lr_decay_style="wsd", plateau=0.8, min_lr=1e-5)
    for before, after, is_resumed, is_steady, rates, rehearsed in pools(2).run(courses, flags, cache_dir):
        assert isinstance(before, Course) and isinstance(after, Course)
        assert (before.last_step, after.last_step) == (342, 25 + 146)
        assert is_resumed and is_steady
        assert rehearsed is None or rehearsed.last_step < 1000  # by a micro-step's time, where no plan says more
        assert rates[:25] == [0.003] * 25  # as they were before the plan was made anew
        assert len(rates) == 171 and rates[135] == 0.003 > rates[136] and rates[-1] == pytest.approx(1e-5)


def unwindowed(world: World, flags: str, cache_dir: Path) -> object:
    with a_job(world, flags, cache_dir) as job:
        return first_course(job, Progress(step=3, course=Course(3600.0, 5, 0.0, 0.5))).course


def test_without_a_window_the_schedule_is_the_configured_one(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    assert pools(1).run(unwindowed, tiny(), cache_dir) == [None]
