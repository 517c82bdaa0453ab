"""`hypershard train`: flags and files to a configuration, then this process's part of the job.

Started by a person it starts its ranks itself; under torchrun or srun it is one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.targets import adapter_targets
from ..config.checks import check, check_data_is_named
from ..config.flags import HelpFormatter, add_settings, parse
from ..config.schema import Config
from ..config.sources import Layer, Resolved, parse_yaml, read_run_file, read_yaml, resolve, show
from ..distributed.env import Ranks, read_ranks, read_surroundings
from ..distributed.spawn import num_gpus, run_ranks
from ..errors import ConfigError, HypershardError, StorageError
from ..log import logger, setup_logging
from ..models.family import family_of
from ..models.files import available_models, model_file

if TYPE_CHECKING:
    from ..distributed.process_group import World
    from ..train.restore import Start

_CONFIG_SECONDS = 60.0  # to fetch a run file from a bucket
_OWN_FLAGS = ("model", "config", "nproc_per_node", "show_config")
_EPILOG = """examples:
  hypershard train --model tiny_llama --max_steps 60
  hypershard train --model llama3_8b --dataset /data/bins --train_batch_size 2 --activation_checkpointing 1
  hypershard train --hidden_width 512 --num_layers 8 --num_heads 8 --dataset notes.txt --nproc_per_node 2
  torchrun --nproc_per_node 8 src/train.py --model llama3_8b --run_dir /fsx/run1 --resume_from_checkpoint
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard train",
        usage="hypershard train [--model NAME] [--config FILE] [--flag value | --flag=value] ...",
        description="Train a causal language model. Values: defaults < model file < run file (--config) < flags.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"model file: a path, or one of {', '.join(available_models())}"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="run file (path or s3:// URI): YAML with any of the settings below"
    )
    parser.add_argument("--nproc_per_node", metavar="N", help="ranks to start here; default: one per GPU, else 1")
    parser.add_argument("--show_config", action="store_true", help="print every value and where it came from, and stop")
    add_settings(parser)
    return parser


def resolve_arguments(namespace: argparse.Namespace) -> tuple[Resolved, str]:
    """The configuration with its sources, and the model's name. Raises ConfigError."""
    flags = {name: value for name, value in vars(namespace).items() if name not in _OWN_FLAGS}
    run_values, model_name = _run_file(namespace.config) if namespace.config else ({}, None)
    model_name = namespace.model or model_name
    layers = []
    if model_name is not None:
        path = model_file(model_name)
        layers.append(Layer(f"model file {path.name}", read_yaml(path)[0]))
    if namespace.config:
        layers.append(Layer(f"run file {namespace.config}", run_values))
    resolved = resolve(*layers, Layer("flag", flags, is_flags=True))
    family = family_of(resolved.config.model.model_type)
    model = family.complete(resolved.config.model)
    family.check(resolved.config.model)
    sources = dict(resolved.sources)
    for name, value in dataclasses.asdict(model).items():
        if value != getattr(resolved.config.model, name):
            sources[name] = f"family {model.model_type}"
    config = dataclasses.replace(resolved.config, model=model)
    check(config)
    adapter_targets(model, config.adapters)  # refuses names that mean nothing in this model
    return Resolved(config, sources), Path(model_name).stem if model_name else model.model_type


def _run_file(location: str) -> tuple[dict[str, Any], str | None]:
    """The settings of --config, a path or an s3:// URI, and the model file it names."""
    if not location.startswith("s3://"):
        return read_run_file(Path(location))
    from ..s3 import S3, Deadline, S3Uri

    try:
        content = S3().read(S3Uri.parse(location), deadline=Deadline.after(_CONFIG_SECONDS))
    except FileNotFoundError:
        raise ConfigError(f"--config={location}: there is no such object") from None
    return parse_yaml(content.decode(errors="replace"), where=location)


def run(argv: Sequence[str]) -> int:
    """Parse, then be the parent of this node's ranks or one of them."""
    namespace = parse(build_parser(), argv, also_known=_OWN_FLAGS)
    ranks = read_ranks()
    setup_logging(rank=ranks.rank)
    try:
        resolved, model_name = resolve_arguments(namespace)
        if namespace.show_config:
            print(show(resolved))
            return 0
        check_data_is_named(resolved.config)
        num_ranks = _num_ranks(namespace, ranks)
    except HypershardError as error:
        return _report(error, ranks)
    if num_ranks == 1 or ranks.launcher != "alone":
        return _train(resolved.config, ranks, model_name)
    from ..train.run_dir import choose_run_dir

    # Chosen here once, because every rank must have the same.
    run_dir = choose_run_dir(resolved.config.report, model_name=model_name)
    command = [sys.executable, "-m", "hypershard.cli.main", "train", *argv, f"--run_dir={run_dir}"]
    return run_ranks(command, num_ranks=num_ranks)


def _num_ranks(namespace: argparse.Namespace, ranks: Ranks) -> int:
    text = namespace.nproc_per_node
    if text is None:
        return ranks.local_world_size if ranks.launcher != "alone" else max(1, num_gpus())
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--nproc_per_node: found {text!r}, expected a whole number of at least 1")
    if ranks.launcher != "alone" and int(text) != ranks.local_world_size:
        raise ConfigError(
            f"--nproc_per_node={text}, but {ranks.launcher} started {ranks.local_world_size} ranks here; drop the flag"
        )
    return int(text)


def _train(config: Config, ranks: Ranks, model_name: str) -> int:
    """One rank's whole life. On an error it leaves at once and alone: the others may be waiting elsewhere."""
    try:
        code = _train_rank(config, ranks, model_name)
    except BaseException as error:  # every way out must be reported and must not wait for other ranks
        code = _report(error, ranks)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train_rank(config: Config, ranks: Ranks, model_name: str) -> int:
    from ..distributed.collectives import from_main
    from ..distributed.process_group import leave, make_deterministic, set_cpu_threads, start
    from ..train.run_dir import choose_run_dir, event_writer, refuse_second_start, write_description
    from ..train.setup import device_name

    set_cpu_threads(ranks)
    if config.parallel.deterministic:
        make_deterministic()
    world = start(ranks)
    run_dir = from_main(choose_run_dir(config.report, model_name=model_name))
    start_from = _start_of(config)
    if not start_from.resume and not config.train.eval_only:
        refuse_second_start(run_dir, _checkpoint_dir(config, run_dir))
    event = event_writer(run_dir, is_main=ranks.is_main)
    if ranks.is_main:
        write_description(run_dir, config, ranks, device_name=device_name(world.device))
        logger.info(f"run directory {run_dir}")
    try:
        _build_and_train(config, world, run_dir=run_dir, start_from=start_from, event=event)
    except Exception as error:  # whatever it is, the run's record names it
        with contextlib.suppress(StorageError):  # a full disk must not hide what went wrong first
            event("failed", error=f"{type(error).__name__}: {error}")
        raise
    leave()
    return 0


def _build_and_train(
    config: Config, world: World, *, run_dir: Path, start_from: Start, event: Callable[..., None]
) -> None:
    from ..train.loop import Schedule
    from ..train.loop import run as train
    from ..train.run_dir import belongings, is_only_read, keep, sinks_opener, text_keeper
    from ..train.setup import build_job
    from .train_plan import RunPlan

    is_main, plan = world.ranks.is_main, RunPlan(run_dir, config, world)
    job = build_job(
        config,
        world,
        checkpoint_dir=_checkpoint_dir(config, run_dir),
        surroundings=read_surroundings(world.ranks),
        alarm=_alarm(event),
        foresee=plan.foresee,
    )
    job.checkpoints.belongings = files = belongings(config, job.tokenizer_path)
    if is_main and not is_only_read(run_dir, config):
        keep(run_dir, files)
    outcome = train(
        job,
        start_from,
        Schedule(
            logging=config.train.logging_freq,
            validation=config.train.validation_freq,
            save_minutes=config.checkpoint.checkpoint_minutes,
        ),
        eval_only=config.train.eval_only,
        open_sinks=sinks_opener(run_dir, config, is_main=is_main, more=[plan]),
        keep_texts=text_keeper(run_dir),
        event=event,
    )
    job.data.loader.close()
    progress, loss = outcome.progress, ""
    if progress.validation_loss is not None and progress.best is not None:
        best = (
            "" if progress.best.step == progress.step else f", lowest {progress.best.loss:.4f} at {progress.best.step}"
        )
        loss = f", validation loss {progress.validation_loss:.4f}{best}"
    logger.info(f"done after step {progress.step} ({outcome.reason}){loss}; everything is in {run_dir}")


def _checkpoint_dir(config: Config, run_dir: Path) -> Path:
    from ..storage import local_path

    given = config.checkpoint.checkpoint_dir
    return local_path(given, flag="--checkpoint_dir") if given else run_dir / "checkpoints"


def _alarm(event: Callable[..., None]) -> Callable[[str], None]:
    """Say what went wrong beside the training, in the log and in the run's record."""

    def alarm(text: str) -> None:
        logger.error(f"ALARM: {text}")
        with contextlib.suppress(StorageError):  # a full disk must not stop what goes on without it
            event("alarm", text=text)

    return alarm


def _start_of(config: Config) -> Start:
    """What --init_from and --resume_from_checkpoint mean together."""
    from ..train.restore import Start

    folder = config.checkpoint.resume_from_checkpoint
    train = config.train
    required = train.init_from == "resume" or (train.eval_only and train.init_from == "scratch")
    source = None if folder is None or folder == "auto" else folder
    return Start(
        resume=folder is not None or required,
        source=source,
        required=required,
        restart_data=config.data.restart_data or train.eval_only,  # other data may well be validated on
    )


def _report(error: BaseException, ranks: Ranks) -> int:
    """Say what happened, once: shared errors on rank 0, a rank's own on that rank. Returns the exit code."""
    if isinstance(error, HypershardError):
        if ranks.is_main or not error.shared_by_all_ranks:
            logger.error(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        logger.error(
            f"out of GPU memory: {text.splitlines()[0]} Lower --train_batch_size or --max_context_width, or add "
            f"--activation_checkpointing=1, --offload_activations=1 or --cpu_offload=1"
        )
    elif any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
        logger.warning("another rank left the job; its own log says why")
    else:
        logger.error("".join(traceback.format_exception(error)))
    return 1
