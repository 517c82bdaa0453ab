"""A model that has learnt conversations by heart gives its answers back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.data.chat_shapes import CHATML, save_tokenizer
from tests.integration.processes import environment, steps, train_well

pytestmark = pytest.mark.slow

ANSWERS = {
    "What shards the weights?": "FSDP2 does, row by row.",
    "Where do checkpoints live?": "In memory, on disks and in S3.",
    "Who plans the run?": "The planner, before any money is spent.",
}


def chat(run_dir: Path, *flags: str, typed: str = "") -> str:
    words = [sys.executable, "-m", "hypershard.cli.main", "chat", str(run_dir), "--temperature=0", *flags]
    done = subprocess.run(
        words, input=typed, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_learnt_by_heart_is_answered(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    run_dir = tmp_path / "run"
    flags = {"dataset": tmp_path / "chats.jsonl", "tokenizer": tokenizer, "max_context_width": 256, "hidden_width": 128}
    train_well(**flags, run_dir=run_dir, max_steps=80, lr=3e-3, warmup=0.05, epochs=100, checkpoint_freq=80)
    assert steps(run_dir)[-1]["loss"] < 0.05
    asked = list(ANSWERS)
    for question in asked[:2]:
        assert chat(run_dir, "--prompt", question) == f"{ANSWERS[question]}\n"
    assert chat(run_dir, typed=f"{asked[2]}\n\n") == f"{ANSWERS[asked[2]]}\n"
