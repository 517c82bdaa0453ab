"""Fit the CPU's factors of plan/coefficients.json: steps of small models on one core, in CPU seconds.

CPU seconds, unlike those on the wall, hardly grow when other work shares the machine. Two factors are fitted, each for
two kinds of work: of so few and small models four would not be told apart. Judged by leaving one model out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from results_file import save

from hypershard.plan import steps
from hypershard.plan.calibration.calibration import calibrate, installed_software
from hypershard.plan.job import Job
from plan import COMMON, CPU_SHAPES, Case, Run, here, pairs, planned, show_pairs

NUM_STEPS, SKIPPED_STEPS = 10, 3
GROUPS = {"products": ("products", "attention"), "memory": ("memory", "logits")}
SHAPES: dict[str, dict[str, Any]] = {
    **CPU_SHAPES,
    "llama wide, full": {**CPU_SHAPES["llama wide"], "activation_checkpointing": "full"},
    "llama small": {"model": "tiny_llama", "bf16": 0, "train_batch_size": 4},
    "llama unmasked": {**CPU_SHAPES["llama deep"], "num_layers": 6, "train_batch_size": 4, "document_mask": 0},
    "llama narrow": {**CPU_SHAPES["llama long"], "hidden_width": 128, "num_layers": 2, "num_heads": 4},
    "qwen2": {"model": "tiny_qwen2", "max_context_width": 512, "num_layers": 4, "train_batch_size": 2, "bf16": 0},
}


def cpu_seconds(case: Case) -> float:
    """Median CPU seconds of a step, in this process on one thread."""
    import torch
    from tests.jobs import a_job

    from hypershard.distributed.env import read_ranks
    from hypershard.distributed.process_group import leave, start
    from hypershard.train.state import Progress, advance
    from hypershard.train.step import train_step

    torch.set_num_threads(1)
    world = start(read_ranks())
    progress, seconds = Progress(), []
    with tempfile.TemporaryDirectory() as folder, a_job(world, " ".join(case.words()), Path(folder)) as job:
        for _ in range(NUM_STEPS):
            begun = time.process_time()
            report = train_step(job, progress, flags=tuple)
            seconds.append(time.process_time() - begun)
            progress = advance(progress, report, seconds=report.seconds)
    leave()
    return statistics.median(seconds[SKIPPED_STEPS:])


def on_one_core(case: Case) -> Job:
    """The case on one core with its share of the machine's memory bandwidth."""
    machine = dataclasses.replace(here(len(os.sched_getaffinity(0))), num_gpus=1)
    return planned(case, lambda _: machine)


def peaks(job: Job) -> list[float]:
    """Seconds at peak rates of each group of work in a step."""
    work = vars(steps.work_of(job))
    return [job.accumulation * sum(work[name] for name in names) for names in GROUPS.values()]


def fit(rows: list[dict[str, Any]]) -> list[float]:
    """Factors that make the squares of relative errors smallest."""
    measured = np.array([row["cpu_seconds"] for row in rows])
    matrix = np.array([row["peak_seconds"] for row in rows]) / measured[:, None]
    rest = 1 - np.array([row["optimizer_seconds"] for row in rows]) / measured
    return [float(value) for value in np.linalg.lstsq(matrix, rest, rcond=None)[0]]


def error(row: dict[str, Any], factors: list[float]) -> float:
    seconds = row["optimizer_seconds"] + float(np.dot(row["peak_seconds"], factors))
    return seconds / row["cpu_seconds"] - 1


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every model predicted by a calibration on every other one, with the factors that are kept."""
    jobs = {row["model"]: on_one_core(Case(row["model"], {**COMMON, **SHAPES[row["model"]]}, 1)) for row in rows}
    runs = {}
    for row in rows:
        found = calibrate(
            jobs[row["model"]],
            run=row["model"],
            step_seconds=[row["cpu_seconds"]] * NUM_STEPS * 2,
            memory_bytes=None,
            software=installed_software(),
            today=datetime.date.today(),
        )
        runs[row["model"]] = Run(found, 0.0)
    return pairs(jobs, [runs, runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: benchmarks/results")
    arguments = parser.parse_args()
    sys.path.append(str(Path(__file__).parent.parent))  # the jobs of the tests
    rows = []
    for name, flags in SHAPES.items():
        case = Case(name, {**COMMON, **flags}, 1)
        job = on_one_core(case)
        rows.append(
            {
                "model": name,
                "cpu_seconds": cpu_seconds(case),
                "peak_seconds": peaks(job),
                "optimizer_seconds": steps._optimizer_seconds(job),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    left_out = [error(row, fit([other for other in rows if other is not row])) for row in rows]
    for row, one in zip(rows, left_out, strict=True):
        print(f"  {row['model']:<18}{row['cpu_seconds']:>8.3f} s{one:>+8.1%} when left out")
    factors = dict(zip(GROUPS, fit(rows), strict=True))
    mean, worst = statistics.fmean(map(abs, left_out)), max(map(abs, left_out))
    print(f"factors {factors}; leaving one model out: mean {mean:.1%}, worst {worst:.1%}")
    show_pairs(paired(rows))
    numbers = {"rows": rows, "factors": factors, "left_out_errors": left_out}
    print(f"written to {save('cpu_factors', numbers, directory=arguments.output)}")


if __name__ == "__main__":
    main()
