"""Training jobs for tests: the real thing at a size that takes milliseconds a step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypershard.cli.train import build_parser, resolve_arguments
from hypershard.config.flags import parse
from hypershard.config.schema import Config
from hypershard.distributed.env import Surroundings
from hypershard.distributed.process_group import World
from hypershard.metrics.on_track import Forecast
from hypershard.train.setup import Job, build_job
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

TINY = (
    "--model tiny_llama --hidden_width 64 --num_layers 3 --num_heads 4 --num_key_value_heads 2 --intermediate_size 128 "
    "--max_context_width 64 --train_batch_size 4 --lr 0.003 --warmup 0 --max_steps 100 --bf16 0"
)


def config_of(flags: str, *, cache_dir: Path) -> Config:
    """The configuration `hypershard train` would have with these flags; later flags win over earlier ones."""
    arguments = parse(build_parser(), [*flags.split(), f"--cache_dir={cache_dir}"], also_known=("model",))
    return resolve_arguments(arguments)[0].config


@contextmanager
def a_job(world: World, flags: str, cache_dir: Path) -> Iterator[Job]:
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(
            config_of(flags, cache_dir=cache_dir),
            world,
            checkpoint_dir=Path(folder),
            surroundings=Surroundings(),
            alarm=print,
            foresee=lambda model, last_step: Forecast(),
        )
        try:
            yield job
        finally:
            job.data.loader.close()


def train_losses(world: World, flags: str, cache_dir: Path, num_steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps: run on every rank of a pool."""
    with a_job(world, flags, cache_dir) as job:
        progress, found = Progress(), []
        for _ in range(num_steps):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=report.seconds)
            found.append((report.loss, report.grad_norm))
        return found


def tiny(**overrides: Any) -> str:
    """The tiny job's flags with `overrides` behind them."""
    return " ".join([TINY, *(f"--{name}={value}" for name, value in overrides.items())])
