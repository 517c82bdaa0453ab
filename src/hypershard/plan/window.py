"""Fit a training into a time window: what of it fits into so many hours, and the flags that make it so.

How long a step takes is not known here: `estimate` is asked, the planner or a calibrated one. The reserve of half an
hour is for what no plan foresees; the schedule is laid over the steps that fit (wsd, whose decay can be moved while the
rate is still held), and saves go by minutes, since steps may be slower than planned.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config.schema import OptimConfig
from ..data.analysis.repetition import LARGE_FINE_TUNING_SAMPLES, SMALL_FINE_TUNING_SAMPLES, most_fine_tuning_epochs
from ..errors import ConfigError
from .profiles import PROFILES, Profile, read_object, refuse_unknown
from .window_fit import RESERVE_HOURS, Estimate, Samples, StepCost, Trial, WindowEstimate, steps_that_fit

__all__ = [
    "RESERVE_HOURS",
    "Estimate",
    "Replan",
    "Samples",
    "StepCost",
    "TrainingRequest",
    "WindowEstimate",
    "WindowPlan",
    "advice",
    "optimize_for_dataset",
    "read_training_config",
    "replanned",
    "report",
    "suggested_profile",
]

CHECKPOINT_MINUTES = 30.0
# Share of the steps at the peak rate; the last fifth decays (Hu et al. 2024, MiniCPM, arXiv:2404.06395, section 4,
# where a tenth is enough; Hägele et al. 2024, arXiv:2405.18392, gain little beyond a fifth).
PLATEAU = 0.8
# Mean tokens of a sample below which sequences may be shorter and more, above which longer and fewer: practice of the
# fine-tuning guides that these profiles are from, no law.
SHORT_SAMPLE_TOKENS, LONG_SAMPLE_TOKENS = 300, 800
AUTO = "auto"
GIVE_WAYS = ("nothing", "steps", "epochs", "length")
_CONFIG_KEYS = ("num_train_epochs", "optimization_priority", "max_training_hours", "base_model")


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """A profile, its estimate and the flags to train with; `changes` to the profile or the wish, each with its reason.

    `training_arguments` are settings by the names of flags.
    """

    profile: Profile
    estimate: WindowEstimate
    training_arguments: dict[str, Any]
    samples: Samples
    max_hours: float
    advice: tuple[str, ...]
    changes: tuple[str, ...]


def optimize_for_dataset(
    num_samples: int,
    avg_tokens_per_sample: float,
    num_epochs: float | None,
    priority: str | Profile,
    max_hours: float,
    *,
    estimate: Estimate,
    give_way: str = "steps",
) -> WindowPlan:
    """Plan a fine-tuning on `num_samples` that ends within `max_hours`, half an hour of them kept in reserve.

    `num_epochs` None: as many as a set of this size bears. `priority`: a profile's name, the user's own profile, or
    'auto' (by the data). The micro-batch is the largest of the profile's that fits into memory, and accumulation
    makes up for it. What does not fit into the window `give_way`: 'steps' (stop within an epoch), 'epochs' (whole ones
    only), 'length' (shorter sequences, halved), or 'nothing' (planned as asked; `fits_in_window` tells).

    Raises ConfigError for values that are no such thing, where nothing fits into memory, and where not one step, one
    epoch or the shortest length fits into the window.
    """
    samples = _checked_samples(num_samples, avg_tokens_per_sample)
    _check_wish(num_epochs, max_hours, give_way)
    profile = _chosen(priority, samples)
    asked_epochs = float(num_epochs or most_fine_tuning_epochs(num_samples))
    changes: list[str] = []
    trial = Trial(samples=samples, asked_epochs=asked_epochs, max_hours=max_hours, estimate=estimate)
    solved, cost = trial.fitted(profile, changes)
    if give_way == "length":
        solved, cost = trial.shortened(solved, cost, changes)
    per_step, per_epoch = solved.samples_per_step * cost.num_gpus, samples.num_sequences(solved.max_context_width)
    if per_step > per_epoch:
        changes.append(
            f"a step takes {per_step} sequences and an epoch has {per_epoch}: train with fewer in a step (own profile)"
        )
    num_steps = trial.steps(solved, cost)
    if give_way in ("steps", "epochs"):
        num_steps = trial.cut(solved, cost, give_way=give_way, changes=changes)
    result = trial.result(solved, cost, num_steps)
    return WindowPlan(
        profile=solved,
        estimate=result,
        training_arguments=_training_arguments(solved, num_steps=num_steps, max_hours=max_hours),
        samples=samples,
        max_hours=max_hours,
        advice=tuple(advice(samples, asked_epochs=asked_epochs)),
        changes=tuple(changes),
    )


def _checked_samples(num_samples: int, avg_tokens_per_sample: float) -> Samples:
    if num_samples < 1:
        raise ConfigError(f"num_samples: found {num_samples}, expected at least 1")
    if not 1 <= avg_tokens_per_sample < math.inf:
        raise ConfigError(f"avg_tokens_per_sample: found {avg_tokens_per_sample}, expected at least 1 token")
    return Samples(num_samples=num_samples, avg_tokens_per_sample=avg_tokens_per_sample)


def _check_wish(num_epochs: float | None, max_hours: float, give_way: str) -> None:
    if num_epochs is not None and not 0 < num_epochs < math.inf:
        raise ConfigError(f"num_epochs: found {num_epochs}, expected a number above 0")
    if not RESERVE_HOURS < max_hours < math.inf:
        raise ConfigError(
            f"--max_hours={max_hours:g}: {RESERVE_HOURS:g} h are kept in reserve, so expected more than that"
        )
    if give_way not in GIVE_WAYS:
        raise ConfigError(f"give_way: found {give_way!r}, expected one of {', '.join(GIVE_WAYS)}")


def _chosen(priority: str | Profile, samples: Samples) -> Profile:
    if isinstance(priority, Profile):
        return priority
    if priority == AUTO:
        return _for_lengths(PROFILES[suggested_profile(samples.num_samples)], samples.avg_tokens_per_sample)
    if priority not in PROFILES:
        raise ConfigError(f"priority: found {priority!r}, expected one of {', '.join((AUTO, *PROFILES))}")
    return PROFILES[priority]


def suggested_profile(num_samples: int) -> str:
    """The profile for a set of this size: a small one bears care, a large one needs speed."""
    if num_samples < SMALL_FINE_TUNING_SAMPLES:
        return "quality"
    return "fast" if num_samples > LARGE_FINE_TUNING_SAMPLES else "balanced"


def _for_lengths(profile: Profile, avg_tokens: float) -> Profile:
    """Half or twice the sequences' length, at the same tokens in memory and in a step."""
    tokens, batch = profile.max_context_width, profile.train_batch_size
    if avg_tokens < SHORT_SAMPLE_TOKENS:
        return dataclasses.replace(profile, max_context_width=tokens // 2, train_batch_size=batch * 2)
    # Longer only where a sequence does not hold two samples: more room than that is filled with other samples.
    if avg_tokens > LONG_SAMPLE_TOKENS and tokens < 2 * avg_tokens and batch % 2 == 0:
        return dataclasses.replace(profile, max_context_width=tokens * 2, train_batch_size=batch // 2)
    return profile


def advice(samples: Samples, *, asked_epochs: float) -> list[str]:
    """What the size of a data set and of its samples speaks for."""
    most = most_fine_tuning_epochs(samples.num_samples)
    name = suggested_profile(samples.num_samples)
    epochs = f"{most - 1} to {most}" if name == "quality" else f"{most}"
    found = [f"{samples.num_samples:,} samples speak for the profile {name} and {epochs} epochs"]
    if asked_epochs > most:
        found.append(f"{asked_epochs:g} epochs are asked for: over-fitting is likely beyond {most}")
    mean = f"{samples.avg_tokens_per_sample:,.0f} tokens a sample"
    if samples.avg_tokens_per_sample < SHORT_SAMPLE_TOKENS:
        found.append(f"{mean} (under {SHORT_SAMPLE_TOKENS}) speak for a shorter length and a larger batch")
    elif samples.avg_tokens_per_sample > LONG_SAMPLE_TOKENS:
        found.append(f"{mean} (over {LONG_SAMPLE_TOKENS}) speak for a longer length and a smaller batch")
    return found


def _training_arguments(profile: Profile, *, num_steps: int, max_hours: float) -> dict[str, Any]:
    """Flags of the plan. The run also ends by itself, saved, where the reserve begins."""
    return {
        **profile.settings(),
        "max_steps": num_steps,
        "max_hours": max_hours - RESERVE_HOURS,
        "lr_decay_style": "wsd",
        "plateau": PLATEAU,
        "checkpoint_minutes": CHECKPOINT_MINUTES,
        "checkpoint_freq": "none",
    }


def report(plan: WindowPlan, *, timestamp: datetime) -> dict[str, Any]:
    """The plan as JSON: timestamp, window, profile, estimate (with `fits_in_window`) and the data set's facts."""
    return {
        "timestamp": timestamp.isoformat(),
        "window": {
            "max_hours": plan.max_hours,
            "reserve_hours": RESERVE_HOURS,
            "available_hours": plan.max_hours - RESERVE_HOURS,
        },
        "profile": {
            "name": plan.profile.name,
            "training_arguments": plan.training_arguments,
            "changes": list(plan.changes),
        },
        "estimate": dataclasses.asdict(plan.estimate),
        "dataset": {
            **dataclasses.asdict(plan.samples),
            "num_sequences": plan.samples.num_sequences(plan.profile.max_context_width),
            "advice": list(plan.advice),
        },
    }


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What a training_config.json asks for; None: it does not say. `base_model` is a model file, folder or hub name."""

    num_train_epochs: float | None
    optimization_priority: str | None
    max_training_hours: float | None
    base_model: str | None


def read_training_config(path: Path) -> TrainingRequest:
    """The request in a JSON file. Raises ConfigError for an unknown key, a value of a wrong kind, a damaged file."""
    values = read_object(path)
    refuse_unknown(values, _CONFIG_KEYS, where=str(path))
    for name in ("num_train_epochs", "max_training_hours"):
        value = values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ConfigError(f"{path}: {name}: found {value!r}, expected a number above 0")
    for name in ("optimization_priority", "base_model"):
        value = values.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{path}: {name}: found {value!r}, expected a text")
    priority = values.get("optimization_priority")
    if priority is not None and priority not in (AUTO, *PROFILES):
        raise ConfigError(
            f"{path}: optimization_priority: found {priority!r}, expected one of {', '.join((AUTO, *PROFILES))}"
        )
    return TrainingRequest(**{name: values.get(name) for name in _CONFIG_KEYS})


@dataclass(frozen=True, kw_only=True)
class Replan:
    """The schedule from here on: the run ends at `last_step`, with `optim`; `why` it is as it is."""

    last_step: int
    optim: OptimConfig
    why: str


def replanned(
    optim: OptimConfig,
    *,
    step: int,
    last_step: int,
    asked_steps: int,
    step_seconds: float,
    seconds_left: float,
) -> Replan:
    """Lay the schedule over the steps that fit, now that a step's seconds were measured.

    After `step` of `last_step`, at most `asked_steps`, with `seconds_left` until the final save has to begin. Steps
    already done keep their rate: wsd only moves the decay, as long as it has not begun, and constant has none. Any
    other style was laid over all steps from the first on, so it is left as it is.
    """
    fitting = max(step + 1, min(asked_steps, step + steps_that_fit(seconds=seconds_left, step_seconds=step_seconds)))
    if fitting == last_step:
        return Replan(last_step=last_step, optim=optim, why="the steps planned are those that fit")
    if optim.lr_decay_style == "constant":
        return Replan(last_step=fitting, optim=optim, why=f"{fitting:,} steps fit, {last_step:,} were planned")
    if optim.lr_decay_style != "wsd" or optim.lr_decay_iters is not None:
        why = f"{fitting:,} steps fit, but the schedule of {last_step:,} has begun; only --lr_decay_style=wsd without "
        return Replan(last_step=last_step, optim=optim, why=why + "--lr_decay_iters can be laid anew")
    warmup_steps = math.ceil(optim.warmup * last_step)
    decay_starts_at = warmup_steps + math.floor(optim.plateau * last_step)
    if step > decay_starts_at:
        why = f"{fitting:,} steps fit, but the decay began after step {decay_starts_at:,}"
        return Replan(last_step=last_step, optim=optim, why=why)
    held = min(max(math.floor(optim.plateau * fitting), step - warmup_steps), fitting - warmup_steps - 1)
    if held < 1:
        why = f"only {fitting:,} steps fit, no more than the warm-up; it stays as it is"
        return Replan(last_step=last_step, optim=optim, why=why)
    # Halves between two whole numbers: the shares give these very steps when the schedule rounds them.
    anew = dataclasses.replace(optim, warmup=max(0.0, (warmup_steps - 0.5) / fitting), plateau=(held + 0.5) / fitting)
    return Replan(last_step=fitting, optim=anew, why=f"{fitting:,} steps fit, {last_step:,} were planned")
