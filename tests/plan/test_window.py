"""A training fitted into hours, from a known speed and a known memory: what is cut, what stays, what is said."""

import dataclasses
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from hypershard.config.checks import check
from hypershard.config.sources import Layer, resolve
from hypershard.errors import ConfigError
from hypershard.optim.schedule import learning_rate
from hypershard.plan.window.profiles import PROFILES, Profile, profile_of, read_profile
from hypershard.plan.window.window import (
    StepCost,
    WindowPlan,
    optimize_for_dataset,
    read_training_config,
    report,
    suggested_profile,
)

OVERHEAD_SECONDS = 300.0


def speed(
    tokens_per_second: float = 10_000.0, *, memory_tokens: int = 10**9, num_gpus: int = 1, quadratic: float = 0.0
):
    """An estimate of a machine that trains so many tokens a second on each GPU, and holds so many at a time."""

    def estimate(profile: Profile) -> StepCost:
        tokens = profile.samples_per_step * profile.max_context_width
        fits = profile.train_batch_size * profile.max_context_width <= memory_tokens
        return StepCost(
            step_seconds=tokens / tokens_per_second * (1 + quadratic * profile.max_context_width),
            overhead_seconds=OVERHEAD_SECONDS,
            band=0.25,
            num_gpus=num_gpus,
            fits_in_memory=fits,
            memory_verdict="fits" if fits else "does not fit; add --activation_checkpointing=1",
        )

    return estimate


def plan_of(estimate=None, **changes) -> WindowPlan:
    values = {
        "num_samples": 10_000,
        "avg_tokens_per_sample": 512.0,
        "num_epochs": 3,
        "priority": "balanced",
        "max_hours": 12.0,
    } | changes
    return optimize_for_dataset(**values, estimate=estimate or speed())


def test_profiles_are_those_of_the_specification() -> None:
    shapes = {
        name: (one.train_batch_size, one.gradient_accumulation_steps, one.max_context_width)
        for name, one in PROFILES.items()
    }
    assert shapes == {
        "fast": (8, 4, 1024),
        "balanced": (4, 8, 2048),
        "quality": (2, 16, 4096),
        "memory_efficient": (1, 32, 2048),
    }
    assert PROFILES["memory_efficient"].settings()["activation_checkpointing"] == "full"
    assert "activation_checkpointing" not in PROFILES["fast"].settings()


def test_what_fits_is_planned_as_asked() -> None:
    plan = plan_of()
    # 10,000 x 512 tokens fill 2,500 sequences of 2,048; three epochs of them at 32 a step are 234 steps.
    estimate = plan.estimate
    assert (estimate.num_steps, estimate.asked_steps, estimate.samples_per_step) == (234, 234, 32)
    assert estimate.num_tokens == 234 * 32 * 2048
    assert estimate.estimated_hours == pytest.approx((300 + 234 * 6.5536) / 3600)
    assert estimate.high_hours == pytest.approx((300 + 234 * 6.5536 * 1.25) / 3600)
    assert estimate.low_hours == pytest.approx((300 + 234 * 6.5536 * 0.75) / 3600)
    assert estimate.epochs == pytest.approx(3, abs=0.01)
    assert (estimate.fits_in_window, estimate.fits_at_worst) == (True, True)
    assert plan.changes == ()
    assert plan.profile == PROFILES["balanced"]


def test_the_arguments_are_flags_that_train_takes() -> None:
    arguments = plan_of(priority="memory_efficient").training_arguments
    config = resolve(Layer("flag", {name: str(value) for name, value in arguments.items()}, is_flags=True)).config
    check(config)
    assert (config.data.train_batch_size, config.data.gradient_accumulation_steps) == (1, 32)
    assert config.model.max_context_width == 2048
    assert config.parallel.activation_checkpointing == "full"
    assert (config.train.max_steps, config.train.max_hours) == (234, 12.0)
    assert (config.checkpoint.checkpoint_minutes, config.checkpoint.checkpoint_freq) == (30, None)
    # The decay ends with the steps that are planned.
    assert learning_rate(234, config.optim, last_step=234) == pytest.approx(config.optim.min_lr)
    assert learning_rate(180, config.optim, last_step=234) == config.optim.lr


def test_steps_give_way_to_the_window_less_half_an_hour() -> None:
    plan = plan_of(num_samples=1_000_000)
    estimate = plan.estimate
    most = int((11.5 * 3600 - 300) / 6.5536)
    assert (estimate.num_steps, estimate.asked_steps) == (most, 23437)
    assert estimate.estimated_hours <= 11.5 < estimate.estimated_hours + 6.5536 / 3600
    assert (estimate.fits_in_window, estimate.fits_at_worst) == (True, False)
    assert plan.training_arguments["max_steps"] == most
    assert len(plan.changes) == 1
    assert "23,437" in plan.changes[0]
    assert estimate.asked_hours > 42


def test_samples_longer_than_a_sequence_fill_one() -> None:
    plan = plan_of(num_samples=3_200, avg_tokens_per_sample=5000.0, num_epochs=1)
    assert plan.estimate.num_steps == 100


def test_nothing_gives_way_where_nothing_may() -> None:
    plan = plan_of(num_samples=1_000_000, give_way="nothing")
    assert plan.estimate.num_steps == plan.training_arguments["max_steps"] == 23437
    assert plan.estimate.fits_in_window is False


def test_whole_epochs_give_way() -> None:
    plan = plan_of(num_samples=300_000, num_epochs=4, give_way="epochs")
    assert plan.estimate.epochs == pytest.approx(2, abs=0.001)
    assert plan.estimate.num_steps == 4687  # int(2 x 75,000 / 32)
    with pytest.raises(ConfigError, match=r"does not hold one epoch: it needs .* raise --max_hours"):
        plan_of(num_samples=1_000_000, give_way="epochs")


def test_length_gives_way() -> None:
    # A token of a sequence of 2,048 costs 3 times one without attention: 7 h for three epochs, 4.7 h at 1,024.
    machine = speed(15_000, quadratic=1e-3)
    wish = {"num_samples": 80_000, "max_hours": 4.8, "give_way": "length"}
    plan = plan_of(machine, **wish)
    assert plan.profile.max_context_width == 512
    assert plan.estimate.samples_per_step * plan.profile.max_context_width == 32 * 2048
    assert plan.estimate.epochs == pytest.approx(3, abs=0.01)
    assert plan.estimate.fits_in_window
    assert plan.estimate.num_steps == plan.estimate.asked_steps
    assert "512 tokens instead of 2048" in plan.changes[-1]
    assert "cut short" not in plan.changes[-1]
    cut = plan_of(machine, **wish, avg_tokens_per_sample=600.0)
    assert cut.profile.max_context_width == 512
    assert "samples have 600 on average, and are cut short" in cut.changes[-1]
    with pytest.raises(ConfigError, match="even at --max_context_width=256"):
        plan_of(machine, **wish | {"max_hours": 1.0})


def test_length_gives_way_on_several_gpus_too() -> None:
    plan = plan_of(speed(15_000, quadratic=1e-3, num_gpus=4), num_samples=320_000, max_hours=5.0, give_way="length")
    assert plan.estimate.samples_per_step * plan.profile.max_context_width == 32 * 2048
    assert plan.estimate.num_gpus == 4


def test_the_micro_batch_is_the_largest_that_fits_into_memory() -> None:
    plan = plan_of(speed(memory_tokens=5000), priority="fast")
    assert (plan.profile.train_batch_size, plan.profile.gradient_accumulation_steps) == (4, 8)
    assert plan.estimate.samples_per_step == 32
    assert plan.changes == ("micro-batch 4 and accumulation 8 instead of 8 and 4; 8 at a time do not fit into memory",)
    halved = plan_of(speed(memory_tokens=3500), priority="fast").profile
    assert (halved.train_batch_size, halved.gradient_accumulation_steps) == (2, 16)  # 3 would fit, and 32 / 3 would not
    with pytest.raises(ConfigError, match=r"train_batch_size=1 at --max_context_width=4096.*activation_checkpointing"):
        plan_of(speed(memory_tokens=4000), priority="quality")


@pytest.mark.parametrize(
    ("num_gpus", "batch", "accumulation", "per_step"), [(2, 4, 4, 32), (8, 4, 1, 32), (16, 2, 1, 32), (64, 1, 1, 64)]
)
def test_many_gpus_accumulate_less(num_gpus: int, batch: int, accumulation: int, per_step: int) -> None:
    plan = plan_of(speed(num_gpus=num_gpus), num_samples=100_000)
    assert (plan.profile.train_batch_size, plan.profile.gradient_accumulation_steps) == (batch, accumulation)
    assert plan.estimate.samples_per_step == per_step
    assert f"32 sequences shared out to {num_gpus} GPUs" in plan.changes[0]
    assert ("a step takes 64 sequences, not 32" in plan.changes[0]) == (num_gpus == 64)
    assert "memory" not in plan.changes[0]


def test_a_step_larger_than_an_epoch_is_told() -> None:
    plan = plan_of(num_samples=100, avg_tokens_per_sample=500)
    assert plan.estimate.num_steps == 2  # 3 epochs of 24 sequences, 32 at a time
    assert "a step takes 32 sequences and an epoch has 24" in plan.changes[0]


def test_no_torch_is_needed() -> None:
    code = "import sys, hypershard.plan.window.window, hypershard.plan.claims.claims; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_data_decides_when_asked_to() -> None:
    assert [suggested_profile(n) for n in (4_999, 5_000, 15_000, 15_001)] == ["quality", "balanced", "balanced", "fast"]
    small = plan_of(num_samples=2_198, num_epochs=None, priority="auto")
    assert (small.profile.name, small.estimate.asked_epochs) == ("quality", 5)
    assert "2,198 samples speak for the profile quality and 4 to 5 epochs" in small.advice
    large = plan_of(num_samples=20_000, num_epochs=None, priority="auto")
    assert (large.profile.name, large.estimate.asked_epochs) == ("fast", 2)
    middle = plan_of(num_samples=8_000, num_epochs=None, priority="auto")
    assert (middle.profile.name, middle.estimate.asked_epochs) == ("balanced", 3)


def test_lengths_of_samples_decide_too() -> None:
    short = plan_of(num_samples=20_000, avg_tokens_per_sample=299, priority="auto").profile
    assert (short.train_batch_size, short.gradient_accumulation_steps, short.max_context_width) == (16, 4, 512)
    long = plan_of(num_samples=20_000, avg_tokens_per_sample=801, priority="auto").profile
    assert (long.train_batch_size, long.gradient_accumulation_steps, long.max_context_width) == (4, 4, 2048)
    roomy = plan_of(num_samples=2_000, avg_tokens_per_sample=801, priority="auto").profile
    assert roomy == PROFILES["quality"]  # 4,096 tokens hold several such samples
    told = plan_of(num_samples=20_000, avg_tokens_per_sample=299, priority="fast")
    assert told.profile == PROFILES["fast"]
    assert any("under 300" in text and "shorter length" in text for text in told.advice)
    assert any("over 800" in text for text in plan_of(avg_tokens_per_sample=900).advice)
    assert not any("tokens a sample" in text for text in plan_of(avg_tokens_per_sample=500).advice)


def test_too_many_epochs_are_told() -> None:
    told = plan_of(num_samples=2_000, num_epochs=6).advice
    assert any("6 epochs are asked for: over-fitting is likely beyond 5" in text for text in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples: found 0"),
        ({"avg_tokens_per_sample": 0.0}, "avg_tokens_per_sample: found 0.0"),
        ({"num_epochs": 0}, "num_epochs: found 0"),
        ({"max_hours": 0.0}, "--max_hours=0: expected a number of hours above 0"),
        ({"priority": "fastest"}, "priority: found 'fastest', expected one of auto, fast, balanced"),
        ({"give_way": "batch"}, "give_way: found 'batch'"),
        ({"max_hours": 0.08}, "does not hold one step"),
    ],
)
def test_wishes_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(**changes)


def test_an_own_profile(tmp_path) -> None:
    path = tmp_path / "profile.json"
    values = {
        "name": "mine",
        "train_batch_size": 3,
        "gradient_accumulation_steps": 10,
        "max_context_width": 1536,
        "num_workers": 2,
        "activation_checkpointing": 1,
        "bf16": True,
        "fused_optimizer": True,
    }
    path.write_text(json.dumps(values))
    profile = read_profile(path)
    assert profile == Profile(
        name="mine",
        train_batch_size=3,
        gradient_accumulation_steps=10,
        max_context_width=1536,
        num_workers=2,
        activation_checkpointing="full",
        bf16=True,
    )
    plan = plan_of(priority=profile)
    assert plan.training_arguments["num_workers"] == 2
    assert plan.training_arguments["activation_checkpointing"] == "full"
    assert plan.estimate.samples_per_step == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batchsize": 3}, "unknown key 'train_batchsize'; did you mean train_batch_size"),
        ({"max_context_width": None}, "max_context_width missing"),
        ({"train_batch_size": 0}, "found 0, expected at least 1"),
        ({"bf16": "maybe"}, "bf16: found 'maybe'"),
        ({"fused_optimizer": False}, "AdamW is always fused"),
    ],
)
def test_own_profiles_that_are_refused(changes: dict, message: str) -> None:
    values = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "max_context_width": 64} | changes
    with pytest.raises(ConfigError, match=message):
        profile_of(values, where="profile.json")


def test_the_report_is_json_with_the_keys_of_the_specification() -> None:
    found = report(plan_of(num_samples=1_000_000), timestamp=datetime(2026, 11, 21, 8, 30, tzinfo=UTC))
    again = json.loads(json.dumps(found))
    assert again == found
    assert list(again) == ["timestamp", "window", "profile", "estimate", "dataset"]
    assert again["timestamp"] == "2026-11-21T08:30:00+00:00"
    assert again["window"] == {"max_hours": 12.0, "reserve_hours": 0.5, "available_hours": 11.5}
    assert again["estimate"]["fits_in_window"] is True
    assert again["profile"]["training_arguments"]["lr_decay_style"] == "wsd"
    assert again["dataset"]["num_samples"] == 1_000_000
    assert again["dataset"]["num_sequences"] == 250_000


def test_a_training_config_is_read(tmp_path) -> None:
    path = tmp_path / "training_config.json"
    values = {
        "num_train_epochs": 3,
        "optimization_priority": "quality",
        "max_training_hours": 12,
        "base_model": "llama3_8b",
    }
    path.write_text(json.dumps(values))
    assert dataclasses.asdict(read_training_config(path)) == values
    path.write_text("{}")
    assert set(dataclasses.asdict(read_training_config(path)).values()) == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_epochs": 3}', "unknown key 'num_epochs'; did you mean num_train_epochs"),
        ('{"max_training_hours": "12"}', "max_training_hours: found '12', expected a number above 0"),
        ('{"num_train_epochs": true}', "num_train_epochs: found True"),
        ('{"max_training_hours": Infinity}', "max_training_hours: found inf"),
        ('{"optimization_priority": "speed"}', "optimization_priority: found 'speed', expected one of auto"),
        ('{"base_model": ""}', "base_model: found ''"),
        ("[]", "found a list, expected an object"),
        ("{", "is not valid JSON"),
    ],
)
def test_training_configs_that_are_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "training_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_training_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_training_config(tmp_path / "none.json")
