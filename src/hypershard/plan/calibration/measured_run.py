"""A run directory as a job and what its steps took, wherever the run was made: on a cluster, then copied here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...catalog.instances import Instance, instances
from ...config.schema import Config, ModelConfig
from ...config.sources import Layer, read_yaml, resolve
from ...data.embedded import VOCAB_SIZE
from ...errors import ConfigError, DataError
from ...metrics.sinks import read_json_lines
from ...models.family import family_of
from ...storage import read_json
from ..here import CPU, this_machine
from ..job import Job
from .calibration import software_name

# What a run directory may not tell, by the flags that then do: `--calibrate RUN --vocab_size 32000`.
TOLD = ("vocab_size", "peak_tflops_per_gpu")


@dataclass(frozen=True)
class Measured:
    """A run's last steps: seconds of each that was logged since it was last started, and the peak of `memory_bytes`:
    reserved by the allocator of rank 0's GPU or, on a CPU, all that its process held. `run` is its folder's name."""

    run: str
    step_seconds: tuple[float, ...]
    memory_bytes: float
    software: str


def job_of_run(run_dir: Path, *, told: Mapping[str, Any]) -> Job:
    """The training that `run_dir` holds, planned for the machine it ran on, from config.yaml, environment.json and,
    where there is one, plan.json. `told` are flags of TOLD, for what these leave open.

    Raises DataError when it is no run directory, ConfigError when something must be told.
    """
    values = read_yaml(_there(run_dir, "config.yaml"))[0]
    config = resolve(Layer(f"run {run_dir}", values), Layer("flag", told, is_flags=True)).config
    environment, plan = _environment(run_dir), _plan(run_dir)
    num_ranks = environment["local_world_size"]
    num_nodes, left = divmod(environment["world_size"], num_ranks)
    if left:
        raise ConfigError(
            f"{run_dir}: {environment['world_size']} ranks do not make whole nodes of {num_ranks}; a plan is for equal "
            f"nodes, so this run cannot be calibrated on"
        )
    model = family_of(config.model.model_type).complete(_with_vocabulary(config, run_dir, plan))
    return Job(
        model=model,
        data=config.data,
        parallel=config.parallel,
        adapters=config.adapters,
        learning=config.learning,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=_instance(environment, str(plan.get("job", {}).get("instance", ""))),
        num_nodes=num_nodes,
    )


def measured(run_dir: Path) -> Measured:
    """What the run's steps took. Raises DataError when there is none."""
    environment = _environment(run_dir)
    steps = [record for record in read_json_lines(run_dir / "metrics.jsonl") if "loss" in record]
    if not steps:
        raise DataError(f"{run_dir} holds no steps; --calibrate takes a run directory of `hypershard train`")
    # A resumed run may have had other ranks before; environment.json is the last start's.
    events = read_json_lines(run_dir / "events.jsonl")
    starts = [event["step"] for event in events if event["event"] == "started"]
    begun = max((step for step in starts if step < steps[-1]["step"]), default=0)
    last = [record for record in steps if record["step"] > begun]
    return Measured(
        run=run_dir.resolve().name,
        step_seconds=tuple(record["step_seconds"] for record in last),
        memory_bytes=float(max(record["memory_bytes"] for record in last)),
        software=software_name(torch=environment["torch"], hypershard=environment["hypershard"]),
    )


def _instance(environment: Mapping[str, Any], planned: str) -> Instance:
    """The node as `here.this_machine` would have put it there; of a CPU's, the cores that the run had."""
    ranks = environment["local_world_size"]
    if environment["device"] != CPU:
        catalogued = planned if any(row.name == planned for row in instances()) else ""
        return this_machine(
            instance_type=catalogued, gpu_name=environment["device"], gpu_memory_mib=None, num_ranks=ranks
        )
    found = this_machine(instance_type="", gpu_name=None, gpu_memory_mib=None, num_ranks=ranks)
    cores = environment["num_cpus"]
    peak = (found.gpu.bf16_tflops or 0.0) * cores / found.num_vcpus
    return dataclasses.replace(found, num_vcpus=cores, gpu=dataclasses.replace(found.gpu, bf16_tflops=peak))


def _with_vocabulary(config: Config, run_dir: Path, plan: Mapping[str, Any]) -> ModelConfig:
    """The model with its vocabulary, which the data's tokenizer decided where the configuration leaves it open."""
    data, found = config.data, config.model.vocab_size or plan.get("model", {}).get("vocab_size")
    if found is None and data.dataset == "embedded" and data.tokenizer is None:
        found = VOCAB_SIZE
    if found is None and (run_dir / "tokenizer" / "tokenizer.json").exists():
        found = _vocabulary_of(_json(run_dir, "tokenizer/tokenizer.json"))
    if found is None:
        raise ConfigError(f"{run_dir} does not say how many ids its tokenizer has: give --vocab_size")
    return dataclasses.replace(config.model, vocab_size=found)


def _vocabulary_of(tokenizer: Mapping[str, Any]) -> int:
    """The largest id + 1, as data/encode/tokenizer.py counts."""
    vocabulary = tokenizer["model"]["vocab"]  # of BPE and WordPiece token -> id, of Unigram a list
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(added["id"] for added in tokenizer.get("added_tokens", []))])


def _there(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not path.is_file():
        raise DataError(f"{path} is missing; --calibrate takes a run directory of `hypershard train`")
    return path


def _json(run_dir: Path, name: str) -> dict[str, Any]:
    path = _there(run_dir, name)
    try:
        content = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: found {type(content).__name__}, expected an object")
    return content


def _environment(run_dir: Path) -> dict[str, Any]:
    content = _json(run_dir, "environment.json")
    missing = {"torch", "hypershard", "device", "num_cpus", "world_size", "local_world_size"} - set(content)
    if missing:
        raise DataError(f"{run_dir / 'environment.json'} has no {', '.join(sorted(missing))}")
    return content


def _plan(run_dir: Path) -> dict[str, Any]:
    return _json(run_dir, "plan.json") if (run_dir / "plan.json").is_file() else {}
