"""Speed and memory of Llama shapes on one GPU: `hypershard train` as a user runs it, one JSON per shape.

Each shape tries its settings from the fastest to the leanest and keeps the first that fits in memory. The whole
takes under nine minutes on one H200; a shape that would not finish in time is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from results_file import save

STEPS, SKIPPED_STEPS = 12, 4


@dataclass(frozen=True)
class Shape:
    """One row: a model file, a length, and (batch size, activation checkpointing) from fast to lean."""

    model: str
    context: int
    tries: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        return f"gpu_{self.model}_{self.context}"


SHAPES = (
    Shape("llama3_1_8b", 4096, ((1, "selective"), (1, "full"))),
    Shape("llama3_1_8b", 8192, ((1, "full"),)),
    Shape("llama3_2_1b", 4096, ((8, "none"), (4, "none"), (8, "selective"))),
    Shape("llama3_2_3b", 4096, ((4, "selective"), (4, "full"))),
    Shape("llama3_2_1b", 8192, ((4, "none"), (4, "selective"))),
    Shape("llama3_2_3b", 8192, ((2, "selective"), (2, "full"))),
)


def measure(shape: Shape, batch_size: int, checkpointing: str, *, seconds_left: float) -> dict[str, object] | str:
    """The row's numbers, or why there are none."""
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary) / "run"
        settings = {
            "max_context_width": shape.context,
            "train_batch_size": batch_size,
            "activation_checkpointing": checkpointing,
            "compile": 1,
            "document_mask": 0,  # one document per sequence, as published figures have it
            "max_steps": STEPS,
            "validation_batches": 1,
            "checkpoint_freq": 0,
            "tensorboard_dir": "none",
            "force": 1,  # what the plan says is held against what happens
            "run_dir": run_dir,
        }
        command = [sys.executable, "-m", "hypershard.cli.main", "train", "--model", shape.model, "--nproc_per_node=1"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds_left, check=False
            )
        except subprocess.TimeoutExpired:
            return "out of time"
        if done.returncode:
            return "out of memory" if "out of GPU memory" in done.stderr else done.stderr[-1500:]
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        planned = json.loads((run_dir / "plan.json").read_text())
    steps = [line for line in lines if "loss" in line][SKIPPED_STEPS:]
    return {
        "model": shape.model,
        "context_tokens": shape.context,
        "batch_size": batch_size,
        "activation_checkpointing": checkpointing,
        "compile": True,
        "precision": "bf16 compute, fp32 master weights and AdamW",
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
        "mfu": statistics.median(step["mfu"] for step in steps) if steps[0]["mfu"] is not None else None,
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "memory_bytes": steps[-1]["memory_bytes"],
        "planned_step_seconds": planned["time"] and planned["time"]["step_seconds"],
        "planned_memory_bytes": planned["memory"]["gpu"]["reserved_bytes"],
        "planned_verdict": planned["memory"]["verdict"],
        "first_loss": lines[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="stop starting shapes after this long")
    parser.add_argument("--output", type=Path, help="folder of the JSON files; default: benchmarks/results")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA GPU; none is visible here")
    ends_at = time.monotonic() + arguments.minutes * 60
    for shape in SHAPES:
        for batch_size, checkpointing in shape.tries:
            left = ends_at - time.monotonic()
            if left < 30:
                print(f"{shape.name}: left out, {arguments.minutes} minutes are over")
                break
            found = measure(shape, batch_size, checkpointing, seconds_left=left)
            if isinstance(found, str):
                print(f"{shape.name} batch {batch_size} {checkpointing}: {found}", flush=True)
                continue
            save(shape.name, found, directory=arguments.output)
            mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
            print(
                f"{shape.name} batch {batch_size} {checkpointing}: {found['tokens_per_second']:,.0f} tokens/s{mfu}, "
                f"{found['memory_bytes'] / 2**30:.1f} GiB",  # type: ignore[operator]
                flush=True,
            )
            break


if __name__ == "__main__":
    main()
