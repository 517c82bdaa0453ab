"""`hypershard plan --calibrate RUN`: what a run measured against the closed form, kept for the plans to come."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

from ..config.schema import SETTINGS
from ..errors import ConfigError
from ..plan.calibration.calibration import FAR, NEAR, Calibration, bands, calibrate
from ..plan.calibration.measured_run import TOLD, Measured, job_of_run, measured
from ..plan.calibration.store import default_folder, load_calibrations, save_calibration
from ..plan.steps import step_time
from ..storage import local_path
from ..units import format_bytes, format_count

HELP = "measure: compare a run directory's steps with the closed form, and keep the factor for plans like it"
FOLDER_HELP = (
    "folder of what --calibrate keeps and plans read, or 'none'; default: ~/.config/hypershard/calibrations "
    "(under $XDG_CONFIG_HOME where that is set)"
)


def run(namespace: argparse.Namespace) -> int:
    """Print what was measured and keep it. Raises DataError for what is no run, ConfigError for too few steps."""
    settings = {*SETTINGS, "model", "config", "instance"}
    given = {name for name, value in vars(namespace).items() if name in settings and value is not None}
    if others := sorted(given - set(TOLD)):
        raise ConfigError(f"--calibrate takes the run as it was: drop {', '.join(f'--{name}' for name in others)}")
    folder = _folder(namespace.calibrations)
    if folder is None:
        raise ConfigError("--calibrations=none keeps nothing, and --calibrate is there to keep: drop one of the two")
    run_dir = local_path(namespace.calibrate, flag="--calibrate")
    job = job_of_run(run_dir, told={name: getattr(namespace, name) for name in given & set(TOLD)})
    found = measured(run_dir)
    made = calibrate(
        job,
        run=found.run,
        step_seconds=found.step_seconds,
        memory_bytes=found.memory_bytes if job.has_gpus else None,
        software=found.software,
        today=datetime.date.today(),
    )
    path = save_calibration(made, folder)
    if namespace.json:
        print(json.dumps({**dataclasses.asdict(made), "factor": made.factor, "file": str(path)}, indent=1))
    else:
        print("\n".join(_page(made, found, band=step_time(job).band, path=path)))
    return 0


def read_calibrations(given: str | None) -> tuple[Calibration, ...]:
    """What --calibrations names, without the flag the default folder. Raises ConfigError: no folder, or damaged."""
    folder = _folder(given)
    if folder is None:
        return ()
    if given is not None and not folder.is_dir():
        raise ConfigError(f"--calibrations={given}: there is no such folder")
    return load_calibrations(folder)


def _folder(given: str | None) -> Path | None:
    if given == "none":
        return None
    return default_folder() if given is None else local_path(given, flag="--calibrations")


def _page(made: Calibration, found: Measured, *, band: float, path: Path) -> Iterator[str]:
    setup, seconds = made.setup, made.step_seconds
    tokens = setup.accumulation * setup.train_batch_size * setup.context_tokens * setup.num_gpus
    yield f"run          {made.run}: {setup}, {made.gpu}; {made.software}"
    yield (
        f"measured     {seconds:.3g} s a step, half of them within {made.iqr_seconds:.2g} s; "
        f"{format_count(tokens / seconds)} tokens/s in all   [{made.num_steps} of {len(found.step_seconds)} steps]"
    )
    yield (
        f"closed form  {made.predicted_seconds:.3g} s a step, {format_count(tokens / made.predicted_seconds)} tokens/s "
        f"in all   [+-{band:.0%}]"
    )
    yield f"factor       {made.factor:.3g}: a step takes so many times the closed form's seconds"
    if made.memory_bytes is not None and made.predicted_memory_bytes is not None:
        off = made.predicted_memory_bytes / made.memory_bytes - 1
        yield (
            f"memory       {format_bytes(made.memory_bytes)} reserved by the allocator; closed form "
            f"{format_bytes(made.predicted_memory_bytes)} ({off:+.1%})"
        )
    else:
        yield f"memory       the process held {format_bytes(found.memory_bytes)}; the closed form lists tensors alone"
    near, other = bands()["near"], bands()["other"]
    yield f"kept         {path}"
    yield (
        f"narrows      plans for the {made.gpu}: to +-{bands()['same']:.0%} with these settings, +-{near:.0%} "
        f"for {setup.model_type} with every size within {NEAR:g} times, +-{other:.0%} within {FAR:g} times"
    )
