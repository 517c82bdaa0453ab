"""LoRA and QLoRA on one device: hypershard against Hugging Face Trainer with PEFT (and bitsandbytes), in one run.

Same shape, random weights, tokens, batch, length, rank, targets, optimizer and clipping. The two take turns, so that a
machine whose speed drifts drifts for both; each round gives one ratio. On a GPU a Llama-3.1-8B shape at 4,096 tokens in
bfloat16, recomputing whole blocks, each side plain and compiled; on a CPU a small one in float32.
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
from pathlib import Path
from typing import Any

from embedded_tokens import write_embedded_tokens
from results_file import save

HERE = Path(__file__).parent
SKIPPED_STEPS = 3
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def jobs(*, has_gpu: bool, steps: int) -> dict[str, dict[str, Any]]:
    """What is trained, by name."""
    if has_gpu:
        common = {"shape": LLAMA_8B, "context": 4096, "batch_size": 1, "bf16": True, "recompute": True}
    else:
        common = {"shape": SMALL, "context": 256, "batch_size": 4, "bf16": False, "recompute": False}
    common["steps"] = steps
    found = {}
    for is_compiled in (False, True) if has_gpu else (False,):
        for name, nf4 in (("lora", False), ("qlora", True)):
            suffix = "_compiled" if is_compiled else ""
            found[name + suffix] = {**common, "nf4": nf4, "compile": is_compiled}
    return found


def ours(job: dict[str, Any], folder: Path, _: Path, seconds_left: float) -> dict[str, Any]:
    """Seconds of each step, losses and memory of hypershard."""
    shape = job["shape"]
    flags = {
        "model_type": "llama_v2",
        "hidden_width": shape["hidden_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape["num_key_value_heads"],
        "intermediate_size": shape["intermediate_size"],
        "vocab_size": shape["vocab_size"],
        "max_context_width": job["context"],
        "max_position_embeddings": shape["max_position_embeddings"],
        "rotary_emb_base": 10000,
        "train_batch_size": job["batch_size"],
        "bf16": int(job["bf16"]),
        "activation_checkpointing": "full" if job["recompute"] else "none",
        "compile": int(job["compile"]),
        "lora_r": 16,
        "lora_alpha": 32,
        "bnb_quant_type": "nf4" if job["nf4"] else "none",
        "document_mask": 0,  # the peer has none
        "max_steps": job["steps"],
        "validation_batches": 1,
        "tensorboard_dir": "none",
        "checkpoint_freq": 0,
        "in_memory_checkpointing_freq": 0,
        "force": 1,  # what the plan says is held against what happens
        "run_dir": folder,
    }
    command = [sys.executable, "-m", "hypershard.cli.main", "train", "--nproc_per_node=1"]
    run([*command, *(f"--{name}={value}" for name, value in flags.items())], seconds_left)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    planned = json.loads((folder / "plan.json").read_text())
    return {
        "seconds": [step["step_seconds"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "memory_bytes": steps[-1]["memory_bytes"],
        "planned_memory_bytes": planned["memory"]["gpu"]["reserved_bytes"],
        "planned_step_seconds": planned["time"] and planned["time"]["step_seconds"],
    }


def peer(job: dict[str, Any], folder: Path, tokens: Path, seconds_left: float) -> dict[str, Any]:
    """The same of Trainer with PEFT."""
    folder.mkdir()
    output = folder / "result.json"
    command = [sys.executable, str(HERE / "peers" / "peft_trainer.py"), "--job", json.dumps(job)]
    run([*command, "--tokens", str(tokens), "--output", str(output)], seconds_left)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def run(command: list[str], seconds_left: float) -> None:
    """RuntimeError with the end of what it said: it failed, or took too long."""
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds_left
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError("out of time") from None
    if done.returncode:
        raise RuntimeError((done.stdout[-500:] + done.stderr[-1500:]).strip())


def compare(name: str, job: dict[str, Any], folder: Path, *, rounds: int, ends_at: float) -> dict[str, Any]:
    """The rounds of one job; `failed` says what one side could not do."""
    per_step = job["batch_size"] * job["context"]
    tokens = write_embedded_tokens(folder / "tokens.bin", job["steps"] * per_step)
    found: dict[str, Any] = {"job": job, "rounds": []}
    for number in range(rounds):
        row: dict[str, Any] = {}
        for side, measure in (("hypershard", ours), ("peft_trainer", peer)):
            left = ends_at - time.monotonic()
            if left < 30:
                found["failed"] = "out of time"
                return found
            try:
                result = measure(job, folder / f"{name}-{side}-{number}", tokens, left)
            except RuntimeError as error:
                found["failed"] = f"{side}: {error}"
                return found
            speed = per_step / statistics.median(result["seconds"][SKIPPED_STEPS:])
            row[side] = {"tokens_per_second": speed, **result}
            del row[side]["seconds"]
        row["ratio"] = row["hypershard"]["tokens_per_second"] / row["peft_trainer"]["tokens_per_second"]
        found["rounds"].append(row)
        print(f"{name} round {number + 1}: " + told(row), flush=True)
    found["median_ratio"] = statistics.median(row["ratio"] for row in found["rounds"])
    return found


def told(row: dict[str, Any]) -> str:
    parts = []
    for side in ("hypershard", "peft_trainer"):
        memory = row[side]["memory_bytes"]
        size = f", {memory / 2**30:.1f} GiB" if memory and row["peft_trainer"]["memory_bytes"] else ""
        parts.append(f"{side} {row[side]['tokens_per_second']:,.0f} tokens/s{size}")
    return f"{'; '.join(parts)}; ratio {row['ratio']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting runs after this long")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: benchmarks/results")
    arguments = parser.parse_args()
    import torch

    ends_at = time.monotonic() + 60 * arguments.minutes
    has_gpu = torch.cuda.is_available()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, job in jobs(has_gpu=has_gpu, steps=arguments.steps).items():
            results[name] = compare(name, job, Path(temporary), rounds=arguments.rounds, ends_at=ends_at)
            if "failed" in results[name]:
                print(f"{name}: {results[name]['failed']}", flush=True)
            else:
                print(f"{name}: median ratio {results[name]['median_ratio']:.3f}", flush=True)
    print(f"written to {save('fine_tune_gpu' if has_gpu else 'fine_tune_cpu', results, directory=arguments.output)}")


if __name__ == "__main__":
    main()
