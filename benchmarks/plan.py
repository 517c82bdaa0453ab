"""Plans a set of runs, runs them, and holds plan and run side by side: seconds of a step and memory.

Three plans of each run: by the closed form alone (a); calibrated on the nearest other run of the set, never on the run
itself (b); calibrated on an earlier run of the same settings (c). All runs take turns, twice: the first round
calibrates, the second is what is predicted. On a machine without a GPU small shapes on 1 and 2 ranks, else 1B and 3B.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_file import save

from hypershard.catalog.instances import Instance
from hypershard.cli.train import build_parser, resolve_arguments
from hypershard.config.flags import parse
from hypershard.data.embedded import VOCAB_SIZE
from hypershard.plan.bytes import gpu_moments, peak, reserved_bytes
from hypershard.plan.calibration.calibration import Calibration, calibrate, calibrated, installed_software, nearest
from hypershard.plan.calibration.measured_run import job_of_run, measured
from hypershard.plan.here import this_machine
from hypershard.plan.job import Job
from hypershard.plan.steps import step_time

STEPS = 25
COMMON = {
    "max_steps": STEPS,
    "validation_batches": 1,
    "checkpoint_freq": 0,
    "in_memory_checkpointing_freq": 0,
    "tensorboard_dir": "none",
}
_LLAMA = {"model_type": "llama_v3", "max_context_width": 256, "bf16": 0}
CPU_SHAPES: dict[str, dict[str, Any]] = {
    "llama wide": {**_LLAMA, "hidden_width": 512, "num_layers": 4, "num_heads": 8, "train_batch_size": 2},
    "llama deep": {**_LLAMA, "hidden_width": 256, "num_layers": 12, "num_heads": 4, "train_batch_size": 2},
    "llama long": {
        **_LLAMA,
        "hidden_width": 256,
        "num_layers": 6,
        "max_context_width": 768,
        "gradient_accumulation_steps": 2,
    },
    "gpt2": {
        **_LLAMA,
        "model_type": "gpt2",
        "hidden_width": 384,
        "num_layers": 6,
        "num_heads": 6,
        "train_batch_size": 2,
    },
    "mixtral": {"model": "tiny_mixtral", "hidden_width": 256, "num_layers": 4, "train_batch_size": 3, "bf16": 0},
}
# The process itself: what its memory is without a model to speak of.
BARE = {**_LLAMA, "hidden_width": 64, "num_layers": 1, "num_heads": 1, "max_context_width": 32, "max_steps": 8}
_1B = {"model": "llama3_2_1b", "max_context_width": 4096, "document_mask": 0}
_3B = {**_1B, "model": "llama3_2_3b"}
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**_1B, "train_batch_size": 4},
    "1b full": {**_1B, "train_batch_size": 4, "activation_checkpointing": "full"},
    "1b long": {**_1B, "max_context_width": 8192, "train_batch_size": 1, "gradient_accumulation_steps": 2},
    "3b": {**_3B, "train_batch_size": 1},
    "3b full": {**_3B, "train_batch_size": 2, "activation_checkpointing": "full"},
}


@dataclass(frozen=True)
class Case:
    """One run to be: its flags, and on how many ranks."""

    name: str
    flags: Mapping[str, Any]
    num_ranks: int

    def words(self) -> list[str]:
        return [f"--{name}={value}" for name, value in {**COMMON, **self.flags}.items()]


@dataclass(frozen=True)
class Run:
    """What a case's run took."""

    calibration: Calibration
    memory_bytes: float


def cases(*, has_gpu: bool) -> list[Case]:
    if has_gpu:
        return [Case(name, flags, 1) for name, flags in GPU_SHAPES.items()]
    return [Case(f"{name}, {n}", flags, n) for name, flags in CPU_SHAPES.items() for n in (1, 2)]


def planned(case: Case, machine: Callable[[int], Instance]) -> Job:
    """The case as the planner sees it, before anything ran."""
    arguments = parse(build_parser(), case.words(), also_known=("model",))
    config = resolve_arguments(arguments)[0].config
    return Job(
        model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or VOCAB_SIZE),
        data=config.data,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=machine(case.num_ranks),
        num_nodes=1,
    )


def here(num_ranks: int) -> Instance:
    import torch

    if not torch.cuda.is_available():
        return this_machine(instance_type="", gpu_name=None, gpu_memory_mib=None, num_ranks=num_ranks)
    found = torch.cuda.get_device_properties(0)
    return this_machine(
        instance_type="", gpu_name=found.name, gpu_memory_mib=found.total_memory >> 20, num_ranks=num_ranks
    )


def train(case: Case, run_dir: Path) -> None:
    """`hypershard train` as a user runs it, with the threads it chooses itself."""
    command = [sys.executable, "-m", "hypershard.cli.main", "train", *case.words()]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    done = subprocess.run(
        [*command, f"--nproc_per_node={case.num_ranks}", f"--run_dir={run_dir}"],
        env={**environment, "XDG_CONFIG_HOME": str(run_dir.parent / "config")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def run(case: Case, job: Job, run_dir: Path) -> Run:
    """Train the case and read what it took, as `hypershard plan --calibrate` does."""
    train(case, run_dir)
    found, ran = measured(run_dir), job_of_run(run_dir, told={})
    assert step_time(ran).seconds == step_time(job).seconds, f"{case.name}: the run was not what was planned"
    calibration = calibrate(
        ran,
        run=case.name,
        step_seconds=found.step_seconds,
        memory_bytes=found.memory_bytes,
        software=found.software,
        today=datetime.date.today(),
    )
    return Run(calibration, found.memory_bytes)


def bare_bytes(folder: Path, num_ranks: int, machine: Callable[[int], Instance]) -> tuple[float, float]:
    """Memory of a process with next to no model: measured, and the closed form's share of it."""
    case = Case("bare", BARE, num_ranks)
    run_dir = folder / f"bare-{num_ranks}"
    train(case, run_dir)
    return measured(run_dir).memory_bytes, tensor_bytes(planned(case, machine))


def tensor_bytes(job: Job) -> float:
    """What the closed form says is in use, or on a GPU reserved, at the worst moment."""
    moments = gpu_moments(job)
    return reserved_bytes(moments) if job.has_gpus else peak(moments).num_bytes


def time_rows(jobs: Mapping[str, Job], rounds: list[dict[str, Run]]) -> list[dict[str, Any]]:
    """Seconds of each case in the last round, beside what the three plans say of it."""
    software, (first, last) = installed_software(), rounds
    rows = []
    for name, job in jobs.items():
        others = [one.calibration for other, one in first.items() if other != name]
        actual = last[name].calibration
        plain = step_time(job)
        other = calibrated(plain, job, others, software=software)
        same = calibrated(plain, job, [first[name].calibration], software=software)
        match = nearest(job, others, software=software)
        rows.append(
            {
                "run": name,
                "parameters": actual.setup.parameters,
                "step_seconds": actual.step_seconds,
                "iqr_seconds": actual.iqr_seconds,
                "closed_form_seconds": plain.seconds,
                "closed_form_band": plain.band,
                "calibrated_by": match.calibration.run if match else None,
                "calibrated_seconds": other.seconds,
                "calibrated_band": other.band,
                "same_seconds": same.seconds,
                "same_band": same.band,
            }
        )
    return rows


def pairs(jobs: Mapping[str, Job], rounds: list[dict[str, Run]]) -> list[dict[str, Any]]:
    """Every run predicted from every other one alone: what bands by distance must hold."""
    software, found = installed_software(), []
    for one, other in itertools.permutations(jobs, 2):
        step = calibrated(step_time(jobs[one]), jobs[one], [rounds[0][other].calibration], software=software)
        actual = rounds[1][one].calibration.step_seconds
        found.append({"run": one, "by": other, "band": step.band, "error": step.seconds / actual - 1})
    return found


def memory_rows(
    jobs: Mapping[str, Job], runs: Mapping[str, Run], bare: Mapping[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Memory of rank 0: on a GPU what the allocator reserved, on a CPU what the process held more than a bare one."""
    rows = []
    for name, job in jobs.items():
        held, foreseen = bare.get(job.num_gpus, (0.0, 0.0))
        rows.append(
            {
                "run": name,
                "measured_bytes": runs[name].memory_bytes - held,
                "predicted_bytes": tensor_bytes(job) - foreseen,
            }
        )
    return rows


def show(times: list[dict[str, Any]], paired: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    print(f"{'run':<16}{'measured':>10}{'(a) closed form':>18}{'(b) by another':>17}{'(c) by the same':>17}   nearest")
    for row in times:
        cells = [row[key] / row["step_seconds"] - 1 for key in
                 ("closed_form_seconds", "calibrated_seconds", "same_seconds")]  # fmt: skip
        line = f"{row['run']:<16}{row['step_seconds']:>8.3f} s{cells[0]:>+18.1%}{cells[1]:>+17.1%}{cells[2]:>+17.1%}"
        print(f"{line}   {row['calibrated_by']} (+-{row['calibrated_band']:.0%})")
    for key, about in (("closed_form", "(a)"), ("calibrated", "(b)"), ("same", "(c)")):
        errors = [abs(row[f"{key}_seconds"] / row["step_seconds"] - 1) for row in times]
        print(f"  {about} mean {statistics.fmean(errors):.1%}, worst {max(errors):.1%}")
    show_pairs(paired)
    print(f"{'run':<16}{'memory measured':>18}{'predicted':>14}{'error':>9}")
    for row in memory:
        error = row["predicted_bytes"] / row["measured_bytes"] - 1
        print(
            f"{row['run']:<16}{row['measured_bytes'] / 2**20:>14,.0f} MiB{row['predicted_bytes'] / 2**20:>10,.0f} MiB"
            f"{error:>+9.1%}"
        )


def show_pairs(paired: list[dict[str, Any]]) -> None:
    for band in sorted({round(pair["band"], 2) for pair in paired}):
        errors = [abs(pair["error"]) for pair in paired if round(pair["band"], 2) == band]
        inside = sum(error <= band for error in errors) / len(errors)
        print(f"  pairs with band +-{band:.0%}: {len(errors)}, {inside:.0%} inside, worst {max(errors):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="give up after this long")
    parser.add_argument("--keep", type=Path, help="folder for the run directories; default: a temporary one")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: benchmarks/results")
    arguments = parser.parse_args()
    import torch

    has_gpu = torch.cuda.is_available()
    jobs = {case.name: (case, planned(case, here)) for case in cases(has_gpu=has_gpu)}
    ends_at = time.monotonic() + arguments.minutes * 60
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        bare = {} if has_gpu else {n: bare_bytes(folder, n, here) for n in (1, 2)}
        rounds: list[dict[str, Run]] = []
        for number in (1, 2):
            rounds.append({})
            for name, (case, job) in jobs.items():
                if time.monotonic() > ends_at:
                    sys.exit(f"{arguments.minutes} minutes are over in round {number}, before {name}")
                found = run(case, job, folder / f"{name.replace(', ', '-').replace(' ', '_')}-{number}")
                rounds[-1][name] = found
                print(f"round {number}: {name}: {found.calibration.step_seconds:.3f} s a step", flush=True)
    plain = {name: job for name, (_, job) in jobs.items()}
    times, paired, memory = time_rows(plain, rounds), pairs(plain, rounds), memory_rows(plain, rounds[1], bare)
    show(times, paired, memory)
    numbers = {
        "steps": STEPS,
        "what_memory_is": "reserved by the allocator" if has_gpu else "resident set of rank 0 above a bare process's",
        "bare_bytes": bare,
        "time": times,
        "pairs": paired,
        "memory": memory,
    }
    print(f"written to {save('plan', numbers, directory=arguments.output)}")


if __name__ == "__main__":
    main()
