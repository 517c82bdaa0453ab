"""`hypershard plan --max_hours H --profile NAME`: a fine-tuning fitted into a time window, and flags to train with."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..config.flags import coerce
from ..config.schema import SETTINGS
from ..errors import ConfigError
from ..plan.data_view import DataView
from ..plan.dollars import Cost, cost
from ..plan.estimate import LEVEL
from ..plan.job import Job
from ..plan.window.cost import Timed, planner_estimate, timed
from ..plan.window.profiles import PROFILES, Profile, read_profile
from ..plan.window.window import AUTO, COURSE, GIVE_WAYS, WindowPlan, optimize_for_dataset, read_training_config, report
from ..storage import local_path, write_json
from ..units import format_count, format_seconds
from . import plan_data
from .plan_asked import Asked, job_with, with_flags

OWN = ("profile", "give_way", "training_config", "report")
# What a profile or the window decides.
_DECIDED = ("train_batch_size", "gradient_accumulation_steps", "global_batch_tokens", "max_context_width", "max_steps")
_GIVE_WAY = "steps"
_NOT_SAID = "DATA"  # in the command, for the user to fill in; no data set is called so


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What makes a plan one for a time window, beside --max_hours and the size of the data."""
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"with --max_hours: how a step is made up: {', '.join((AUTO, *PROFILES))}, or a JSON file of your own "
        f"(default: {AUTO}, by the data)",
    )
    parser.add_argument(
        "--give_way",
        choices=GIVE_WAYS,
        help=f"what is cut where the window does not hold all of it (default: {_GIVE_WAY})",
    )
    parser.add_argument(
        "--training_config",
        metavar="FILE",
        help="JSON with num_train_epochs, optimization_priority, max_training_hours, base_model; flags go before it",
    )
    parser.add_argument("--report", metavar="FILE", help="also write the window's plan as JSON")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A window's plan with everything that the page and the report say of it."""

    plan: WindowPlan
    job: Job
    time: Timed
    cost: Cost
    view: DataView
    command: str


def with_training_config(namespace: argparse.Namespace) -> argparse.Namespace:
    """`namespace` with what --training_config asks for, where no flag says otherwise. Raises ConfigError."""
    namespace.num_train_epochs = None
    if namespace.training_config is None:
        return namespace
    request = read_training_config(local_path(namespace.training_config, flag="--training_config"))
    values = vars(namespace)
    if request.base_model is not None and namespace.model is None:
        values["model"] = request.base_model
    if request.max_training_hours is not None:
        values.setdefault("max_hours", str(request.max_training_hours))
    values["profile"] = namespace.profile or request.optimization_priority
    values["num_train_epochs"] = request.num_train_epochs
    return namespace


def is_wanted(namespace: argparse.Namespace, question: Asked) -> bool:
    """Whether a profile is to be chosen: asked for, or hours and samples are known and nothing says what a step is.

    Raises ConfigError where it is asked for, and hours or samples are missing.
    """
    facts, hours = question.facts, question.job.train.max_hours
    is_known = facts is not None and facts.mean_tokens is not None
    given = [name for name in OWN if getattr(namespace, name) is not None]
    if not given:
        data = question.job.data  # a run file may have decided too
        is_open = not any(name in namespace for name in _DECIDED) and data.global_batch_tokens is None
        is_open = is_open and data.packing != "none"
        return hours is not None and is_known and facts is not None and facts.is_fine_tuning and is_open
    if hours is None:
        raise ConfigError(f"--{given[0]} is of a plan for a time window: give its hours, --max_hours")
    if not is_known:
        raise ConfigError(
            f"--{given[0]} fits samples into a time window: say how many and how long, by --num_samples and "
            f"--tokens_per_sample, by token bins in --dataset, or by --dataset_facts"
        )
    return True


def run(namespace: argparse.Namespace, question: Asked) -> int:
    """Print the window's plan; 0 whether or not all of it fits. Raises ConfigError as `optimize_for_dataset` does, and
    for flags that the profile decides."""
    made = _made(namespace, question)
    values = _values(made, question, now=datetime.now().astimezone())
    if namespace.report is not None:
        write_json(local_path(namespace.report, flag="--report"), values)
    print(json.dumps(values, indent=1) if namespace.json else "\n".join(_page(made, question)))
    return 0


def _made(namespace: argparse.Namespace, question: Asked) -> Made:
    facts, hours = question.facts, question.job.train.max_hours
    assert facts is not None and facts.num_samples is not None and facts.mean_tokens is not None and hours is not None
    profile = _profile(namespace.profile or AUTO)
    _refuse_decided(namespace, question, profile)
    course = _course(namespace)

    def job_of(profile: Profile) -> Job:
        return job_with(question, with_flags(namespace, {**course, **profile.settings()}))

    speeds: dict[str, Any] = {
        "tokens_per_second_per_gpu": question.tokens_per_second_per_gpu,
        "calibrations": question.calibrations,
    }
    plan = optimize_for_dataset(
        facts.num_samples,
        facts.mean_tokens,
        _epochs(namespace),
        profile,
        hours,
        estimate=planner_estimate(job_of, **speeds),
        give_way=namespace.give_way or _GIVE_WAY,
    )
    job = job_of(plan.profile)
    view = plan_data.view_of(facts, job, num_steps=plan.estimate.num_steps)
    assert view is not None
    return Made(
        plan=plan,
        job=job,
        time=timed(job, **speeds),
        cost=cost(job, question.price, hours=plan.estimate.estimated_hours),
        view=view,
        command=_command(namespace, {**plan.training_arguments, **course}, not_ours=set(COURSE) - set(course)),
    )


def _profile(name: str) -> str | Profile:
    return read_profile(local_path(name, flag="--profile")) if name.endswith(".json") else name


def _refuse_decided(namespace: argparse.Namespace, question: Asked, profile: str | Profile) -> None:
    """Raise ConfigError for a flag that the profile decides, and so could not act."""
    chosen = PROFILES.get(profile) if isinstance(profile, str) else profile
    decided = {*_DECIDED, *(chosen.settings() if chosen else ())}
    found = sorted(name for name in decided if name in namespace)
    if not found and question.job.data.global_batch_tokens is not None:
        found = ["global_batch_tokens"]
    if "max_steps" in found:
        raise ConfigError("--max_steps: the window decides it; drop the flag, --epochs says how much is wanted")
    if question.job.data.packing == "none":
        raise ConfigError("--packing=none: a profile is planned for packed samples; drop one of the two")
    if found:
        raise ConfigError(
            f"--{found[0]}: the profile decides it; drop the flag, or write a profile of your own: --profile=FILE.json"
        )


def _course(namespace: argparse.Namespace) -> dict[str, Any]:
    """How a window decays and saves, less what the user says of it."""
    course = {name: value for name, value in COURSE.items() if name not in namespace}
    if "lr_decay_style" in namespace and "plateau" in course:
        del course["plateau"]
    return course


def _epochs(namespace: argparse.Namespace) -> float | None:
    if "epochs" in namespace:
        given: int | None = coerce("epochs", namespace.epochs, where="--epochs")
        return given
    asked: float | None = namespace.num_train_epochs
    return asked


def _command(namespace: argparse.Namespace, arguments: Mapping[str, Any], *, not_ours: set[str]) -> str:
    """`hypershard train` with the user's flags and the plan's."""
    given = {name: value for name, value in vars(namespace).items() if name in SETTINGS}
    named = {name: getattr(namespace, name) for name in ("model", "config") if getattr(namespace, name) is not None}
    ours = {name: value for name, value in arguments.items() if name not in not_ours}
    flags = {**named, "dataset": _NOT_SAID, **given, **ours}
    return " ".join(("hypershard train", *(f"--{name}={shlex.quote(_text(flags[name]))}" for name in flags)))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- what is said


def _values(made: Made, question: Asked, *, now: datetime) -> dict[str, Any]:
    """The report: the window's own, with the job, its cost, and what was assumed."""
    told = report(made.plan, timestamp=now)
    return {
        **told,
        "dataset": {**told["dataset"], **made.view.as_dict()},
        "job": {
            "model": question.name,
            "instance": made.job.instance.name,
            "num_nodes": made.job.num_nodes,
            "num_gpus": made.job.num_gpus,
            "command": made.command,
        },
        "cost": {
            "dollars": made.cost.dollars,
            "formula": made.cost.formula,
            "price": str(made.cost.price or "unknown"),
        },
        "overheads": {
            "once_seconds": dict(made.time.beside.once),
            "each_step_seconds": dict(made.time.beside.each_step),
        },
        "level": _level(made, question),
        "assumptions": _assumptions(made),
    }


def _level(made: Made, question: Asked) -> str:
    return made.time.step.level if question.tokens_per_second_per_gpu is None else "measured speed"


def _assumptions(made: Made) -> list[str]:
    return [*made.time.beside.assumptions, *made.time.step.assumptions]


def _page(made: Made, question: Asked) -> Iterator[str]:
    plan, job = made.plan, made.job
    estimate, profile = plan.estimate, plan.profile
    machine = job.instance
    yield f"model    {question.name} ({job.model.model_type})"
    yield f"job      {job.num_nodes} x {machine.name} ({machine.num_gpus} x {machine.gpu.name})"
    data, *about = plan_data.data_lines(made.view, dataset=question.dataset)
    yield data
    yield from (f"         {text}" for text in plan.advice)
    yield from about
    yield (
        f"profile  {profile.name}: {profile.train_batch_size} x {profile.gradient_accumulation_steps} x "
        f"{profile.max_context_width:,} tokens on each of {estimate.num_gpus} GPUs, "
        f"{estimate.samples_per_step} sequences a step"
    )
    yield from (f"         {text}" for text in plan.changes)
    yield from _hours_lines(made, question)
    yield f"memory   {estimate.memory_verdict}   [{LEVEL}]"
    told = made.cost.price or "price unknown"
    yield f"cost     {made.cost.formula or 'unknown'}   [{question.service}: {told}]"
    yield ""
    yield f"train    {made.command}"
    if job.num_nodes > 1:
        yield f"         on {job.num_nodes} nodes: `hypershard launch` takes the same flags"
    if job.train.init_from == "scratch":
        yield "         a fine-tuning starts from weights: add --init_from with the model's folder"
    if made.command.partition("--dataset=")[2].partition(" ")[0] == _NOT_SAID:
        yield f"         put the data set's name in the place of {_NOT_SAID}"
    yield ""
    for index, text in enumerate(_assumptions(made)):
        yield f"{'assumed' if index == 0 else '':<8} {text}"


def _hours_lines(made: Made, question: Asked) -> Iterator[str]:
    plan, estimate = made.plan, made.plan.estimate
    told = report(plan, timestamp=datetime.min)["window"]
    if estimate.fits_in_window:
        verdict = "fits, at worst too" if estimate.fits_at_worst else "fits; at worst it does not"
    else:
        verdict = "does not fit"
    yield f"window   {plan.max_hours:g} h, of which {told['reserve_hours']:g} h are kept in reserve: {verdict}"
    tokens = format_count(estimate.num_tokens)
    yield (
        f"hours    {estimate.low_hours:.3g} - {estimate.estimated_hours:.3g} - {estimate.high_hours:.3g} for "
        f"{estimate.num_steps:,} steps, {estimate.epochs:.2f} epochs, {tokens} tokens   "
        f"[{_level(made, question)}, +-{estimate.band:.0%}]"
    )
    once = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in made.time.beside.once.items())
    yield f"         {estimate.step_seconds:.3g} s a step; besides {once}"
