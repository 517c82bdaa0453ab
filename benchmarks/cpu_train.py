"""A small Llama on 2 gloo ranks: hypershard against Hugging Face Trainer with accelerate's FSDP2, in one run.

Same model, precision (float32), sequences per rank, length, optimizer, clipping, full sharding, one thread per rank.
The two take turns, so that a machine whose speed drifts drifts for both; each round gives one ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from embedded_tokens import write_embedded_tokens
from results_file import save

HERE = Path(__file__).parent
CONTEXT, BATCH_SIZE, VOCAB, RANKS, SKIPPED_STEPS = 256, 4, 4096, 2, 3
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
FLAGS = {
    "model_type": "llama_v2",
    "hidden_width": SHAPE["hidden_size"],
    "num_layers": SHAPE["num_hidden_layers"],
    "num_heads": SHAPE["num_attention_heads"],
    "num_key_value_heads": SHAPE["num_key_value_heads"],
    "intermediate_size": SHAPE["intermediate_size"],
    "vocab_size": VOCAB,
    "max_context_width": CONTEXT,
    "train_batch_size": BATCH_SIZE,
    "bf16": 0,
    "document_mask": 0,  # the peer has none
    "validation_batches": 1,
    "tensorboard_dir": "none",
    "checkpoint_freq": 0,
}


def ours(folder: Path, steps: int) -> float:
    """Tokens per second of hypershard."""
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "-m", "hypershard.cli.main", "train", *flags, f"--max_steps={steps}"]
    run([*command, f"--nproc_per_node={RANKS}", f"--run_dir={folder}"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if "loss" in line]
    return tokens_per_second(seconds)


def peer(folder: Path, steps: int, tokens: Path) -> float:
    """Tokens per second of Hugging Face Trainer with FSDP2."""
    output = folder / "result.json"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    command += [str(HERE / "peers" / "hf_trainer.py"), "--shape", json.dumps(SHAPE), "--tokens", str(tokens)]
    command += ["--context", str(CONTEXT), "--batch_size", str(BATCH_SIZE), "--steps", str(steps)]
    run([*command, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["fsdp2"], "the peer did not shard: the comparison would be of other work"
    return tokens_per_second(result["seconds"])


def tokens_per_second(seconds: list[float]) -> float:
    return CONTEXT * BATCH_SIZE * RANKS / statistics.median(seconds[SKIPPED_STEPS:])


def run(command: list[str]) -> None:
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = arguments.steps * CONTEXT * BATCH_SIZE * RANKS
        tokens = write_embedded_tokens(folder / "tokens.bin", count)
        rounds = []
        for number in range(arguments.rounds):
            mine = ours(folder / f"ours{number}", arguments.steps)
            theirs = peer(folder / f"peer{number}", arguments.steps, tokens)
            rounds.append({"hypershard": mine, "hf_trainer_fsdp2": theirs, "ratio": mine / theirs})
            print(
                f"round {number + 1}: hypershard {mine:,.0f} tokens/s, Trainer {theirs:,.0f}, ratio {mine / theirs:.3f}"
            )
    ratio = statistics.median(entry["ratio"] for entry in rounds)
    print(f"median ratio {ratio:.3f} over {len(rounds)} rounds")
    numbers = {"steps": arguments.steps, "shape": SHAPE, "batch_size": BATCH_SIZE, "ranks": RANKS, "rounds": rounds}
    print(f"written to {save('cpu_train', {**numbers, 'median_ratio': ratio})}")


if __name__ == "__main__":
    main()
