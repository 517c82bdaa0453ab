"""Time beside the steps, worked out by hand: what is written, read and copied, over stated speeds."""

import pytest
from tests.plan_jobs import job_of

from hypershard.plan.job import Job, sizes_of
from hypershard.plan.overheads import (
    _PROMPT_TOKENS,
    COMPILE_SECONDS,
    DISK_GB_PER_SECOND,
    START_SECONDS,
    hours_window,
    overheads,
)
from hypershard.plan.steps import communication, host_bytes_per_second
from hypershard.train import prompts

STEP_SECONDS = 6.0


def beside(**flags):
    job = job_of("llama3_2_1b", num_nodes=2, **flags)
    return job, overheads(job, step_seconds=STEP_SECONDS)


def write_seconds(job: Job) -> float:
    """Weights and two moments in float32, each of two nodes its half."""
    return 12 * sizes_of(job.model).total / 2 / (DISK_GB_PER_SECOND * 1e9)


def test_once() -> None:
    job, found = beside(gradient_accumulation_steps=2, validation_batches=5)
    # Forward is a third of a micro-step, which is half of a step.
    expected = {"start": START_SECONDS, "last validation": 5 * 3.0 / 3, "final save": write_seconds(job)}
    assert found.once == pytest.approx(expected)
    assert beside(compile=1)[1].once["compilation"] == COMPILE_SECONDS
    weights = sizes_of(job.model).total
    assert beside(init_from="models/llama")[1].once["loading weights"] == pytest.approx(2 * weights / 1e9)
    assert beside(init_from="resume", run_dir="runs/a")[1].once["loading weights"] == pytest.approx(write_seconds(job))
    both = beside(s3_tier_base_path="s3://bucket/run")[1].once["final save"]
    assert both == pytest.approx(2 * found.once["final save"])
    assert "final save" not in beside(checkpoint_freq=0)[1].once


def test_texts_cost_a_forward_for_each_token() -> None:
    """20 texts on 16 GPUs are 2 rows on some: forwards of 2 x 42 tokens, but none quicker than the weights come."""

    def seconds(step_seconds: float, **flags: int) -> float:
        job = job_of("llama3_2_1b", num_nodes=2, train_batch_size=4, **flags)
        return overheads(job, step_seconds=step_seconds).once["last validation"]

    texts = {"validation_texts": 20, "validation_text_tokens": 10}
    of_texts = seconds(600.0, **texts) - seconds(600.0)
    context = job_of("llama3_2_1b", num_nodes=2).model.max_context_width
    assert of_texts == pytest.approx(10 * 600 / 3 * 2 * (32 + 10) / (4 * context))
    job = job_of("llama3_2_1b", num_nodes=2)
    # In bfloat16 two gathers of 2 bytes and a reduction of 4.
    assert seconds(1e-9, **texts) == pytest.approx(10 * communication(job).hidden / 4)
    assert seconds(1e-9, **texts, val_batch_size=1) == pytest.approx(2 * 10 * communication(job).hidden / 4)


def test_each_step() -> None:
    job, found = beside(validation_freq=10, validation_batches=5, checkpoint_freq="none")
    copy = 12 * sizes_of(job.model).total / 16 / host_bytes_per_second(job)
    assert found.each_step == pytest.approx({"validations": 5 * STEP_SECONDS / 3 / 10, "saves": copy / 10})
    quiet = {"in_memory_checkpointing_freq": 0}
    assert beside(checkpoint_freq="none", **quiet)[1].each_step == {}
    durable = beside(checkpoint_freq=50, **quiet)[1].each_step["saves"]
    assert durable == pytest.approx(copy / 50)
    waiting = beside(checkpoint_freq=50, async_checkpointing=0, **quiet)[1].each_step["saves"]
    assert waiting == pytest.approx((copy + write_seconds(job)) / 50)
    by_minutes = beside(checkpoint_freq="none", checkpoint_minutes=30, **quiet)[1].each_step["saves"]
    assert by_minutes == pytest.approx(copy * STEP_SECONDS / 1800)


def test_what_fits_into_hours() -> None:
    job, found = beside()
    window = hours_window(job, max_hours=4, step_seconds=STEP_SECONDS)
    step = STEP_SECONDS + found.each_step_seconds
    assert window.num_steps == int((4 * 0.95 * 3600 - found.once_seconds) / step)
    assert hours_window(job, max_hours=0.01, step_seconds=STEP_SECONDS).num_steps == 0


def test_prompts_are_planned_as_long_as_they_are_cut() -> None:
    assert _PROMPT_TOKENS == prompts._TEXT_PROMPT_TOKENS
