"""Fit a training into a time window: what of it fits into so many hours, and the flags that make it so.

How long a step takes is not known here: `estimate` is asked, such as the planner (window_cost.py). The reserve, which
training keeps too (optim/replan.py), is for what no plan foresees; the schedule is laid over the steps that fit (wsd,
whose decay can be moved while the rate is still held), and saves go by minutes, since steps may be slower than planned.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...data.analysis.repetition import LARGE_FINE_TUNING_SAMPLES, SMALL_FINE_TUNING_SAMPLES, most_fine_tuning_epochs
from ...errors import ConfigError
from ...optim.replan import reserve_hours
from .fit import Estimate, Samples, StepCost, Trial, WindowEstimate
from .profiles import PROFILES, Profile, read_object, refuse_unknown

__all__ = [
    "AUTO",
    "COURSE",
    "GIVE_WAYS",
    "Estimate",
    "Samples",
    "StepCost",
    "TrainingRequest",
    "WindowEstimate",
    "WindowPlan",
    "advice",
    "optimize_for_dataset",
    "read_training_config",
    "report",
    "suggested_profile",
]

_CHECKPOINT_MINUTES = 30.0
# Share of the steps at the peak rate; the last fifth decays (Hu et al. 2024, MiniCPM, arXiv:2404.06395, section 4,
# where a tenth is enough; Hägele et al. 2024, arXiv:2405.18392, gain little beyond a fifth).
_PLATEAU = 0.8
# How a training in a window decays and saves, whatever the profile, by the names of flags.
COURSE: dict[str, Any] = {
    "lr_decay_style": "wsd",
    "plateau": _PLATEAU,
    "checkpoint_minutes": _CHECKPOINT_MINUTES,
    "checkpoint_freq": "none",
}
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
    """Plan a fine-tuning on `num_samples` that ends within `max_hours` less their reserve.

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
    if not 0 < max_hours < math.inf:
        raise ConfigError(f"--max_hours={max_hours:g}: expected a number of hours above 0")
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
    """Flags of the plan. The run itself plans anew, within the same reserve, once it has measured its steps."""
    return {
        **profile.settings(),
        "max_steps": num_steps,
        "max_hours": max_hours,
        **COURSE,
    }


def report(plan: WindowPlan, *, timestamp: datetime) -> dict[str, Any]:
    """The plan as JSON: timestamp, window, profile, estimate (with `fits_in_window`) and the data set's facts."""
    return {
        "timestamp": timestamp.isoformat(),
        "window": {
            "max_hours": plan.max_hours,
            "reserve_hours": reserve_hours(plan.max_hours),
            "available_hours": plan.max_hours - reserve_hours(plan.max_hours),
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
