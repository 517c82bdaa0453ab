"""From what a person asked for to the job's value: flags checked before anything waits in a queue."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..catalog.instances import instance as find_instance
from ..config.checks import check_data_is_named
from ..config.flags import add_settings, coerce, parse
from ..config.schema import SETTINGS
from ..config.sources import Layer, read_run_file, resolve
from ..errors import ConfigError
from ..models.files import model_file
from ..storage import local_path
from .environment import check_extra, environment_for
from .job import Job, Resources
from .sagemaker_environment import CHANNELS

# Flags of `hypershard train` that a job cannot have, and why.
_REFUSED = {
    "nproc_per_node": "a job starts one rank per GPU of its instances",
    "run_dir": "it is the launcher's own, the same for all nodes",
    "show_config": "it trains nothing; `hypershard train --show_config` does the same here",
}


def build_job(
    *,
    train_flags: Sequence[str],
    model_name: str | None,
    instance: str | None,
    num_nodes: int,
    run_dir: str,
    hours: float,
    image: str | None,
    max_restarts: int,
    name: str | None,
    extra_environment: Mapping[str, str],
    channels: Collection[str] = (),
) -> Job:
    """The job that trains `model_name` with `train_flags` on `num_nodes` nodes.

    `instance` is any name `catalog.instances.instance` takes; None: nodes the catalog does not know, taken as without
    GPUs. `name` None: made of --run_name, the model or the run file, the instance family and the number of nodes. The
    job always resumes, so that a restart goes on. `extra_environment` goes before `environment_for`'s. `channels`: by
    name, what SageMaker gives the job; some are flags in its container.

    Raises ConfigError for an unknown or refused flag, a value out of range, a variable no job may set, or conversations
    to train on that nothing names. Whether the settings go together otherwise is for `hypershard train` to say, which
    knows the model file too.
    """
    given = checked_flags(train_flags)
    _check_data(given, channels)
    _check_numbers(num_nodes=num_nodes, hours=hours, max_restarts=max_restarts)
    if not run_dir:
        raise ConfigError("--run_dir: found nothing, expected a folder that all nodes see")
    run_dir = str(local_path(run_dir, flag="--run_dir"))  # no shell expands a ~ that is quoted
    check_extra(extra_environment)
    row = None if instance is None else find_instance(instance)
    model = _one_model(model_name, given.get("model"))
    flags = [f"--model={model}"] if model is not None and "model" not in given else []
    flags += [*train_flags, f"--run_dir={run_dir}"]
    if "resume_from_checkpoint" not in given:
        flags.append("--resume_from_checkpoint=auto")
    wish = given.get("run_name") or model or given.get("config")
    return Job(
        name=name or _name(wish, row.family if row else None, num_nodes),
        train_flags=tuple(flags),
        environment={**environment_for(row, run_dir=run_dir), **extra_environment},
        resources=Resources(
            instance_type=row.name if row else "",
            num_nodes=num_nodes,
            gpus_per_node=row.num_gpus if row else 0,
            efa_interfaces=row.efa_interfaces if row else 0,
        ),
        run_dir=run_dir,
        hours=hours,
        max_restarts=max_restarts,
        image=image,
    )


def checked_flags(train_flags: Sequence[str]) -> dict[str, str]:
    """Flag -> its text. Raises ConfigError for one that `hypershard train` does not have or a job may not."""
    parser = argparse.ArgumentParser(prog="hypershard train", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", default=argparse.SUPPRESS)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    parser.add_argument("--nproc_per_node", default=argparse.SUPPRESS)
    parser.add_argument("--show_config", action="store_true", default=argparse.SUPPRESS)
    add_settings(parser)
    try:
        given = vars(parse(parser, train_flags, also_known=("model", "config")))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    for flag, why in _REFUSED.items():
        if flag in given:
            raise ConfigError(f"--{flag}: a job does not take this flag: {why}")
    values = {flag: coerce(flag, text, where=f"--{flag}") for flag, text in given.items() if flag in SETTINGS}
    source = values.get("resume_from_checkpoint", "auto")
    if source != "auto" and not values.get("eval_only"):
        raise ConfigError(
            f"--resume_from_checkpoint={source}: every restart of the job would go back to there; begin with "
            f"`hypershard checkpoint copy {source} RUN_DIR/checkpoints`, and the job goes on from it by itself"
        )
    return given


def _check_data(given: Mapping[str, str], channels: Collection[str]) -> None:
    """Refuse a job that would end on its nodes for want of data. What a run file elsewhere says is not known here."""
    config = given.get("config")
    is_here = config is None or Path(config).expanduser().is_file()
    if not is_here or any(CHANNELS.get(channel) in ("dataset", "config") for channel in channels):
        return
    layers = [] if config is None else [Layer(f"run file {config}", read_run_file(Path(config))[0])]
    flags = {name: text for name, text in given.items() if name in SETTINGS}
    check_data_is_named(resolve(*layers, Layer("flag", flags, is_flags=True)).config)


def _one_model(asked: str | None, in_flags: str | None) -> str | None:
    """The model's name, which may stand beside the flags of training or among them. It must exist here."""
    if asked is not None and in_flags is not None and asked != in_flags:
        raise ConfigError(f"--model={in_flags}: found another model beside --model={asked}; give one")
    model = asked if asked is not None else in_flags
    if model is not None:
        model_file(model)
    return model


def _check_numbers(*, num_nodes: int, hours: float, max_restarts: int) -> None:
    if num_nodes < 1:
        raise ConfigError(f"--nodes={num_nodes}: expected at least 1")
    if not (hours > 0 and math.isfinite(hours)):
        raise ConfigError(f"--hours={hours:g}: expected hours above 0, after which the cluster may end the job")
    if max_restarts < 0:
        raise ConfigError(f"--max_restarts={max_restarts}: expected at least 0")


def _name(wish: str | None, family: str | None, num_nodes: int) -> str:
    """`llama3_8b`, p5, 4 -> `llama3-8b-p5-x4`: what every cluster takes, short enough for a suffix."""
    parts = [Path(wish).stem if wish else "train", family or "cpu", f"x{num_nodes}"]
    return re.sub(r"[^a-zA-Z0-9]+", "-", "-".join(parts)).strip("-")[-50:].strip("-")
