"""The files of slurm/: one for every model file, on nodes that suit its size.

Weights, gradients and AdamW's two moments are 16 bytes a parameter, spread over all GPUs (full sharding); the nodes are
so many that this takes at most a quarter of the GPUs' memory, which leaves the rest to activations and to what is
gathered. slurm/README.md has the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..storage import make_directory, write_bytes
from .build import build_job
from .slurm import SlurmOptions, render

RUN_DIR = "runs/%x-%j"  # a new one for each submission, the same after each requeue
_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Plan:
    """Where a model is trained unless one says otherwise. `instance` None: nodes without GPUs."""

    instance: str | None
    num_nodes: int
    hours: float = 24.0
    save_seconds: int = 300
    flags: tuple[str, ...] = ()


# A short run on the text that comes with the program: it proves the cluster. --dataset and --max_steps make it yours.
_TRY = ("--dataset=embedded", "--max_steps=100")
# Whole blocks are recomputed in backward: what long sequences need on GPUs of 80 GB.
_LARGE = ("--activation_checkpointing=full", "--sharding_strategy=full")
_TINY = Plan(None, 2, hours=1.0, save_seconds=60, flags=("--dataset=embedded", "--max_steps=60", "--bf16=0"))


def _on_p5(num_nodes: int, *, sequences: int = 2, save_seconds: int = 300) -> Plan:
    flags = (f"--train_batch_size={sequences}", *_LARGE, *_TRY)
    return Plan("p5.48xlarge", num_nodes, save_seconds=save_seconds, flags=flags)


_ONE_POINT_FOUR = Plan("g6e.12xlarge", 1, flags=("--train_batch_size=4", *_LARGE, *_TRY))

PLANS = {
    "llama_1_36b": _ONE_POINT_FOUR,
    "gpt2_1_36b": _ONE_POINT_FOUR,
    "llama3_2_1b": _on_p5(1),
    "llama3_2_3b": _on_p5(1),
    "llama2_7b": _on_p5(2),
    "mathstral_7b": _on_p5(2, sequences=1),
    "llama3_8b": _on_p5(2),
    "llama3_1_8b": _on_p5(2),
    "llama2_13b": _on_p5(2),
    "deepseek_r1_distill_qwen_32b": _on_p5(4, save_seconds=600),
    "mixtral_8x7b": _on_p5(8, sequences=1, save_seconds=600),
    "llama2_70b": _on_p5(8, save_seconds=600),
    "llama3_1_70b": _on_p5(8, sequences=1, save_seconds=600),
    "llama4_scout_17b_16e": _on_p5(16, sequences=1, save_seconds=900),
}


def plan_for(model: str | None) -> Plan:
    """Where `model` is trained unless one says otherwise. A model of one's own has no instance in its plan."""
    if model is not None and model.startswith("tiny_"):
        return _TINY
    return PLANS.get(model or "", Plan(None, 1))


def file_text(model: str) -> str:
    """The text of slurm/<model>.sbatch. Raises ConfigError for a model without a plan."""
    plan = plan_for(model)
    if plan.instance is None and not model.startswith("tiny_"):
        raise ConfigError(f"model {model}: found no plan of instance and nodes; add one to launch/slurm_files.py")
    job = build_job(
        train_flags=plan.flags,
        model_name=model,
        instance=plan.instance,
        num_nodes=plan.num_nodes,
        run_dir=RUN_DIR,
        hours=plan.hours,
        image=None,
        max_restarts=_MAX_RESTARTS,
        name=model.replace("_", "-"),
        extra_environment={},
    )
    return render(job, SlurmOptions(file=f"slurm/{model}.sbatch", save_seconds=plan.save_seconds))


def write_all(folder: Path, models: Sequence[str]) -> list[Path]:
    """Write the file of every model; the paths written."""
    make_directory(folder)
    paths = []
    for model in models:
        path = folder / f"{model}.sbatch"
        write_bytes(path, file_text(model).encode())
        paths.append(path)
    return paths
