"""What one step must not get wrong in silence."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.jobs import a_job, tiny
from tests.rank_pool import RankPool

from hypershard.data.packing import IGNORED_LABEL, Batch
from hypershard.distributed.process_group import World
from hypershard.errors import TrainingDiverged
from hypershard.train import guard
from hypershard.train.evaluate import evaluate
from hypershard.train.rehearse import rehearse
from hypershard.train.state import Progress, StepReport, advance, seed_everything
from hypershard.train.step import on_device, train_step
from hypershard.train.stop import Limits, stop_reason


def uneven_loss(world: World, flags: str, cache_dir: Path) -> tuple[float, float]:
    """(our loss, mean over all valid tokens) when ranks have very different numbers of valid labels."""
    with a_job(world, flags, cache_dir) as job:
        batches = job.data.loader.step(0, accumulation=job.accumulation)
        uneven = []
        for index, batch in enumerate(batches):
            labels = batch.labels.clone()
            labels[:, 3 + 7 * (2 * index + world.ranks.rank) :] = IGNORED_LABEL
            uneven.append(dataclasses.replace(batch, labels=labels))
        with torch.no_grad():
            sums = [float(job.module(*on_device(job, batch))) for batch in uneven]
        job.sharded.reshard()
        counts = [batch.num_valid_tokens for batch in uneven]
        gathered: list[tuple[float, int]] = [(0.0, 0)] * world.size
        torch.distributed.all_gather_object(gathered, (sum(sums), sum(counts)))
        expected = sum(total for total, _ in gathered) / sum(count for _, count in gathered)

        class Fixed:
            def step(self, *_: object, **__: object) -> list[Batch]:
                return uneven

        report = train_step(
            dataclasses.replace(job, data=dataclasses.replace(job.data, loader=Fixed())), Progress(), flags=tuple
        )
        return report.loss, expected


def test_loss_is_per_valid_token_over_ranks_and_micro_steps(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    flags = tiny(train_batch_size=1, gradient_accumulation_steps=2)
    for loss, expected in pools(2).run(uneven_loss, flags, cache_dir):
        assert loss == pytest.approx(expected, rel=1e-6)


def nan_step(world: World, flags: str, cache_dir: Path) -> dict[str, object]:
    """Put a NaN into one rank's gradient: no rank may change a weight."""
    with a_job(world, flags, cache_dir) as job:
        before = {name: p.to_local().clone() for name, p in job.parameters.items()}  # type: ignore[attr-defined]
        parameter = job.parameters["model.norm.weight"]
        healthy = parameter.detach().to_local().clone()  # type: ignore[attr-defined]
        if world.ranks.rank == 1:
            parameter.detach().to_local().view(-1)[0] = float("nan")  # type: ignore[attr-defined]
        report = train_step(job, Progress(), flags=tuple)
        parameter.detach().to_local().copy_(healthy)  # type: ignore[attr-defined]
        unchanged = all(torch.equal(p.to_local(), before[n]) for n, p in job.parameters.items())  # type: ignore[attr-defined]
        moments = all(not job.optimizer.state[p]["exp_avg"].to_local().any() for p in job.parameters.values())
        steps = {float(state["step"]) for state in job.optimizer.state.values()}
        good = train_step(job, advance(Progress(), report, seconds=0.0), flags=tuple)
        return {
            "skipped": report.skipped,
            "unchanged": unchanged,
            "moments": moments,
            "steps": steps,
            "then": math.isfinite(good.loss) and not good.skipped,
        }


def test_nan_never_reaches_the_weights(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    for found in pools(2).run(nan_step, tiny(train_batch_size=1), cache_dir):
        assert found == {"skipped": True, "unchanged": True, "moments": True, "steps": {0.0}, "then": True}


def test_the_guard_gives_up_after_the_allowed_number() -> None:
    report = StepReport(float("nan"), 1.0, 1e-3, 10, 2, 0.1, 0.0, 0.0, True, {}, ())
    progress = Progress(step=4, samples=8)
    for number in range(3):
        progress = advance(progress, report, seconds=report.seconds)
        assert progress.skipped_in_row == number + 1
        guard.check(report, progress, max_skipped_steps=3)
    progress = advance(progress, report, seconds=report.seconds)
    with pytest.raises(TrainingDiverged, match=r"4 steps in a row.*positions 14 to 15"):
        guard.check(report, progress, max_skipped_steps=3)
    good = dataclasses.replace(report, skipped=False)
    assert advance(progress, good, seconds=0.0).skipped_in_row == 0


def context_of_batches(world: World, flags: str, cache_dir: Path) -> tuple[int, ...]:
    with a_job(world, flags, cache_dir) as job:
        return tuple(job.data.loader.step(0, accumulation=1)[0].input_ids.shape)


@pytest.mark.parametrize("context", [32, 96])
def test_the_sequence_length_is_the_flags(pools: Callable[[int], RankPool], cache_dir: Path, context: int) -> None:
    flags = tiny(max_context_width=context, train_batch_size=3)
    assert pools(1).run(context_of_batches, flags, cache_dir)[0] == (3, context)


def rehearsal_leaves_no_trace(world: World, flags: str, cache_dir: Path) -> tuple[float, float, bool]:
    with a_job(world, flags, cache_dir) as job:
        rehearse(job)
        clean = all(parameter.grad is None for parameter in job.parameters.values())
        after = train_step(job, Progress(), flags=tuple).loss
    with a_job(world, flags, cache_dir) as job:
        return after, train_step(job, Progress(), flags=tuple).loss, clean


def test_the_rehearsal_leaves_no_trace(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    flags = "--model tiny_gpt2 --num_layers 2 --resid_pdrop 0.1 --max_steps 9 --lr 0.01 --bf16 0"
    rehearsed, plain, clean = pools(2).run(rehearsal_leaves_no_trace, flags, cache_dir)[0]
    assert clean
    assert rehearsed == plain


def dropout_losses(world: World, flags: str, cache_dir: Path) -> list[float]:
    """Loss of the same step, twice, and of another step on the same data: what the seed decides."""
    with a_job(world, flags, cache_dir) as job:
        batch = job.data.loader.step(0, accumulation=1)[0]
        found = []
        for step in (1, 1, 2):
            seed_everything(job.seed, step=step, rank=world.ranks.rank)
            with torch.no_grad():
                found.append(float(job.module(*on_device(job, batch))))
        job.sharded.reshard()
        return found


def test_random_numbers_are_a_function_of_seed_step_and_rank(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    flags = "--model tiny_gpt2 --num_layers 2 --resid_pdrop 0.2 --embd_pdrop 0.1 --max_steps 9 --bf16 0"
    once, again, other = pools(1).run(dropout_losses, flags, cache_dir)[0]
    assert once == again
    assert once != other
    reseeded = pools(1).run(dropout_losses, f"{flags} --seed 7", cache_dir)[0]
    assert reseeded[0] != once
    first, second = pools(2).run(dropout_losses, flags, cache_dir)
    assert first != second


def validation(world: World, flags: str, cache_dir: Path) -> tuple[float, float, bool]:
    with a_job(world, flags, cache_dir) as job:
        before = evaluate(job)["validation_loss"]
        train_step(job, Progress(), flags=tuple)
        after = evaluate(job)["validation_loss"]
        return before, after, job.module.training


def test_validation_is_the_same_on_one_and_two_ranks_and_ends_in_training_mode(
    pools: Callable[[int], RankPool], cache_dir: Path
) -> None:
    one = pools(1).run(validation, tiny(val_batch_size=4, validation_batches=2), cache_dir)[0]
    for two in pools(2).run(validation, tiny(train_batch_size=2, val_batch_size=2, validation_batches=2), cache_dir):
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        assert two[1] == pytest.approx(one[1], rel=2e-5)
        assert two[1] < two[0]
        assert two[2] is True


def test_reasons_to_stop() -> None:
    assert stop_reason(Progress(step=9), Limits(10, None), asked=None) is None
    assert stop_reason(Progress(step=10), Limits(10, None), asked=None) == "steps"
    assert stop_reason(Progress(step=3), Limits(10, None), asked="SIGTERM") == "SIGTERM"


def test_seeding_reaches_every_generator() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    seed_everything(1, step=2, rank=3)
    first = draw()
    seed_everything(1, step=2, rank=3)
    assert draw() == first
    for changed in ({"step": 3, "rank": 3}, {"step": 2, "rank": 4}):
        seed_everything(1, **changed)
        assert all(new != old for new, old in zip(draw(), first, strict=True))
