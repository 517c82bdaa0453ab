"""When a run ends and when it saves, by the clock, by signals and by its validations."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.jobs import config_of, tiny
from tests.rank_pool import RankPool

from hypershard.distributed.env import Surroundings
from hypershard.distributed.process_group import World
from hypershard.metrics.on_track import Forecast
from hypershard.train.loop import Schedule, run
from hypershard.train.restore import Start
from hypershard.train.setup import build_job
from hypershard.train.state import Progress, judged
from hypershard.train.stop import Limits, SaveWish, StopSignals, stop_reason


def test_a_run_stops_early_enough_for_its_last_save() -> None:
    limits = Limits(last_step=100, max_seconds=60.0, ends_at=1000.0)
    at = {"reserve_seconds": 10.0}
    assert limits.time_over(Progress(seconds=49.0), now=900.0, **at) is None
    assert limits.time_over(Progress(seconds=50.0), now=900.0, **at) == "hours"
    assert limits.time_over(Progress(seconds=1.0), now=989.0, **at) is None
    assert limits.time_over(Progress(seconds=1.0), now=990.0, **at) == "time limit"
    assert Limits(last_step=1, max_seconds=None).time_over(Progress(seconds=1e9), now=1e12, **at) is None


def test_minutes_ask_for_a_save_that_leaves_the_node() -> None:
    wish = SaveWish(30.0, now=0.0)
    assert not wish.is_wanted(1799.0)
    assert wish.is_wanted(1800.0)
    wish.granted(["memory"], 1800.0)
    assert wish.is_wanted(1801.0), "memory is not what was wished for"
    wish.granted(["memory", "disk"], 1802.0)
    assert not wish.is_wanted(3601.0)
    assert wish.is_wanted(3602.0)
    assert not SaveWish(None, now=0.0).is_wanted(1e9)


def test_sigusr2_asks_for_a_save_and_no_stop() -> None:
    wish = SaveWish(None, now=0.0)
    before = signal.getsignal(signal.SIGUSR2)
    with StopSignals(wish) as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert wish.is_wanted(0.0) and signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_run_ends_early_when_validations_get_no_better() -> None:
    """By at least 1 % of the best; a loss that is no number is no better either."""
    limits, progress = Limits(last_step=100, max_seconds=None, patience=2, min_gain=0.01), Progress()
    reasons, steps = [], []
    for step, loss in enumerate([5.0, 4.0, 3.97, 3.0, float("nan"), 2.99, 2.0], 1):
        progress = judged(dataclasses.replace(progress, step=step), loss, min_gain=limits.min_gain)
        reasons.append(stop_reason(progress, limits, asked=None))
        steps.append(progress.best_step)
    assert steps == [1, 2, 2, 4, 4, 4, 7]
    assert reasons == [None, None, None, None, None, "early", None]
    assert stop_reason(progress, Limits(100, None), asked=None) is None, "without a patience it never does"


def whole_run(world: World, flags: str, cache_dir: Path, folder: Path, resume: bool) -> dict[str, Any]:
    """Why and where a run ended, where it began, its best step, and the checkpoints it left."""
    config = config_of(flags, cache_dir=cache_dir)
    job = build_job(
        config,
        world,
        checkpoint_dir=folder,
        surroundings=Surroundings(),
        alarm=print,
        foresee=lambda model, last_step: Forecast(),
    )
    began: list[int] = []
    outcome = run(
        job,
        Start(resume=resume, required=resume),
        Schedule(logging=1, validation=config.train.validation_freq, save_minutes=None),
        eval_only=False,
        open_sinks=lambda step, last_step: began.append(step) or [],  # type: ignore[func-returns-value]
        keep_texts=lambda step, texts: None,
        event=lambda name, **facts: None,
    )
    job.data.loader.close()
    return {
        "reason": outcome.reason,
        "steps": (*began, outcome.progress.step),
        "best": outcome.progress.best_step,
        "kept": sorted(path.name for path in folder.glob("step-*")),
    }


def test_a_run_of_two_ranks_ends_early_keeps_its_best_and_stays_ended(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path
) -> None:
    """No loss is nine tenths lower than the first. More patience lets the run go on from where it ended."""
    settings = {"validation_freq": 2, "validation_batches": 1, "early_stopping_min_gain": 0.9, "keep_best": 1}
    saves = {"checkpoint_freq": 1, "keep_checkpoints": 1, "in_memory_checkpointing_freq": 0}
    flags = tiny(train_batch_size=1, num_layers=1, **settings, **saves)
    expected = {"reason": "early", "best": 2}
    for patience, resume, steps in ((1, False, (0, 4)), (1, True, (4, 4)), (2, True, (4, 6))):
        given = f"{flags} --early_stopping_patience {patience}"
        kept = ["step-00000002", f"step-{steps[1]:08d}"]
        found = pools(2).run(whole_run, given, cache_dir, tmp_path, resume)
        assert found == [{**expected, "steps": steps, "kept": kept}] * 2
