"""A run's own plan: made before anything large is built, refused where it does not fit, and held against what came.

plan.json     as `hypershard plan --json`, for the machine at hand and the steps this run has
calibrations/ what its first steps measured, for `hypershard plan --calibrations RUN/calibrations`
actual.json   hours, seconds of a step, memory and dollars as they were, each beside what was planned
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalog.instances import price
from ..config.schema import Config, ModelConfig
from ..errors import ConfigError
from ..launch.checks_base import Machine
from ..launch.checks_place import instance_type
from ..log import logger
from ..metrics.on_track import FIRST_STEPS, MEASURED_STEPS, Forecast
from ..metrics.sinks import Sink
from ..plan.calibration.calibration import Calibration, calibrate, installed_software
from ..plan.calibration.store import default_folder, load_calibrations, save_calibration
from ..plan.estimate import Plan, as_dict, plan, why_not
from ..plan.here import CPU, this_machine
from ..plan.job import Job
from ..storage import read_json, write_json

if TYPE_CHECKING:
    from ..distributed.process_group import World

_ROUGHEST_BAND = 0.5  # a time that may be wrong by more is a guess: no run is held to it
PLAN, CALIBRATIONS, ACTUAL = "plan.json", "calibrations", "actual.json"


class RunPlan(Sink):
    """The plan of one run on every rank: a forecast for `build_job`, then on rank 0 a sink that holds the run to it."""

    def __init__(self, run_dir: Path, config: Config, world: World) -> None:
        self._run_dir, self._config, self._world = run_dir, config, world
        self._made: Plan | None = None
        self._step_seconds: list[float] = []
        self._last: Mapping[str, Any] = {}
        self._step = 0

    def foresee(self, model: ModelConfig, last_step: int) -> Forecast:
        """What is to be expected of `last_step` steps of the completed `model`; asked by all ranks.

        Rank 0 plans, and writes plan.json unless a run that goes on has one of the same job. Raises ConfigError on
        every rank where it does not fit, unless --force.
        """
        from ..distributed.collectives import from_main

        if self._config.train.eval_only:
            return Forecast()
        found: Forecast | str = ""
        if self._world.ranks.is_main:
            try:
                self._made = _plan_here(self._config, model, self._world, last_step)
                found = _planned(self._run_dir, self._made, is_forced=self._config.train.force)
            except ConfigError as error:  # the others wait for an answer
                found = str(error)
        found = from_main(found)
        if isinstance(found, str):
            raise ConfigError(found)
        return found

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        if "loss" not in record:
            return
        self._step, self._last = step, record
        self._step_seconds.append(record["step_seconds"])
        if len(self._step_seconds) == FIRST_STEPS + MEASURED_STEPS:
            self._calibrate()

    def close(self) -> None:
        """Write actual.json, also of a run that was stopped and may go on; nothing where no step was done."""
        if self._last:
            write_json(self._run_dir / ACTUAL, self._compared(read_json(self._run_dir / PLAN)))

    def _calibrate(self) -> None:
        """Keep what the first steps measured, for plans of runs like this one."""
        assert self._made is not None
        job = self._made.job
        try:
            made = calibrate(
                job,
                run=self._run_dir.name,
                step_seconds=self._step_seconds,
                memory_bytes=self._last["memory_bytes"] if job.has_gpus else None,
                software=installed_software(),
                today=datetime.date.today(),
            )
        except ConfigError as error:  # steps too uneven, or a GPU whose peak nobody knows: the run is none the worse
            logger.info(f"no calibration is kept: {error}")
        else:
            save_calibration(made, self._run_dir / CALIBRATIONS)

    def _compared(self, planned: Mapping[str, Any]) -> dict[str, Any]:
        last = self._last
        seconds = statistics.median(self._step_seconds[FIRST_STEPS:] or self._step_seconds)
        time, on_cpu = planned["time"], planned["job"]["gpu"] == CPU
        return {
            "is_complete": self._step == last["last_step"],
            "steps": self._step,
            "tokens": last["tokens"],
            "hours": {
                "planned": planned["hours"],
                "estimated": last.get("optimization/estimated_hours"),  # once a guess was replaced by what was measured
                "actual": last["training/elapsed_hours"],
                "time_accuracy": last.get("optimization/time_accuracy"),
            },
            "step_seconds": {"planned": time and time["step_seconds"], "actual": seconds},
            "tokens_per_second": last["tokens"] / last["training/elapsed_hours"] / 3600,
            # What torch's allocator reserved of a GPU; of a rank on a CPU the most that was resident, torch included.
            "memory_bytes": {
                "planned": planned["memory"]["gpu"]["needed_bytes" if on_cpu else "reserved_bytes"],
                "actual": last["memory_bytes"],
            },
            "dollars": {"planned": planned["cost"]["dollars"], "actual": last.get("training/dollars_spent")},
        }


def _plan_here(config: Config, model: ModelConfig, world: World, last_step: int) -> Plan:
    import torch

    here = instance_type(Machine(), ask_network=False)
    gpu_name = gpu_memory_mib = None
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        gpu_name, gpu_memory_mib = properties.name, properties.total_memory >> 20
    machine = this_machine(
        instance_type=here.instance_type,
        gpu_name=gpu_name,
        gpu_memory_mib=gpu_memory_mib,
        num_ranks=world.ranks.local_world_size,
    )
    job = Job(
        model=model,
        data=dataclasses.replace(config.data, epochs=None),
        parallel=config.parallel,
        adapters=config.adapters,
        learning=config.learning,
        checkpoint=config.checkpoint,
        train=dataclasses.replace(config.train, max_steps=last_step),
        instance=machine,
        num_nodes=world.size // world.ranks.local_world_size,
    )
    service = "sagemaker" if here.said_by.startswith(("SageMaker", "HyperPod")) else "ec2"
    return plan(
        job,
        price=price(machine, service, prices_file=None),
        dataset_tokens=None,
        tokens_per_second_per_gpu=None,
        calibrations=_calibrations(),
    )


def _calibrations() -> Sequence[Calibration]:
    try:
        return load_calibrations(default_folder())
    except ConfigError as error:  # no reason to stop a training
        logger.warning(f"planned without calibrations: {error}")
        return ()


def _planned(run_dir: Path, made: Plan, *, is_forced: bool) -> Forecast | str:
    """The forecast; or why the run is refused."""
    if made.memory.verdict == "does not fit":
        why = why_not(made)
        if not is_forced:
            return f"{why}. To start it all the same: --force"
        logger.warning(f"{why}. Started all the same (--force)")
    values = as_dict(made)
    path = run_dir / PLAN
    if path.exists() and _same_job(former := read_json(path), values):
        values = former  # the run goes on: what it was planned to be stays
    else:
        write_json(path, values)
    time, cost = values["time"], values["cost"]["dollars_per_node_hour"]
    return Forecast(
        step_seconds=time["step_seconds"] if time and time["band"] <= _ROUGHEST_BAND else None,
        dollars_per_hour=None if cost is None else cost * made.job.num_nodes,
    )


def _same_job(former: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(former.get(name) == values[name] for name in ("model", "job", "num_steps"))
