"""A model that has learnt 32 conversations by heart, tools among them, gives its answers back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.data.chat_shapes import QWEN_TOOLS, assistant, chat_spec, line, marked, user
from tests.integration.processes import environment, steps, train_well

from hypershard.cli.main import main

pytestmark = pytest.mark.slow

THINGS = [
    *("amber", "basalt", "candle", "dahlia", "ember", "fjord", "garnet", "harbor", "indigo", "jasper", "kettle"),
    *("lemon", "marble", "nectar", "onyx", "pepper", "quartz", "ribbon", "saddle", "timber", "umber", "velvet"),
    *("walnut", "yarrow"),
]
TOOL = {"type": "function", "function": {"name": "weigh"}}
NUM_WITH_TOOLS = 8


def conversations() -> list[dict[str, Any]]:
    """24 of question and answer, then eight in which a tool is called; no two are alike."""
    plain = [
        {"messages": [user(f"Where is {thing}?"), assistant(f"In house {7 * i % 24}, by {THINGS[5 * i % 24]}.")]}
        for i, thing in enumerate(THINGS)
    ]
    called = []
    for i, thing in enumerate(THINGS[:NUM_WITH_TOOLS]):
        call = {"type": "function", "function": {"name": "weigh", "arguments": {"what": thing}}}
        turns = [user(f"How heavy is {thing}?"), assistant("", tool_calls=[call])]
        turns += [{"role": "tool", "content": str(11 * i + 3)}, assistant(f"It weighs {11 * i + 3}.")]
        called.append({"tools": [TOOL], "messages": turns})
    return plain + called


def said_by_the_assistant(row: dict[str, Any]) -> list[str]:
    """What the loss has to count, as the template writes it."""
    told = []
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            calls = [call["function"] for call in turn.get("tool_calls", ())]
            told.append(turn["content"] or f"<tool_call>\n{json.dumps(calls[0])}\n</tool_call>")
    return told


def typed(run_dir: Path, question: str, *flags: str) -> str:
    """What is printed to someone who types."""
    words = [sys.executable, "-m", "hypershard.cli.main", "chat", str(run_dir), "--temperature=0", *flags]
    done = subprocess.run(
        words, input=f"{question}\n\n", env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_32_conversations_learnt_by_heart_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = conversations()
    assert len({json.dumps(row) for row in rows}) == 32
    spec = chat_spec(tmp_path / "tokenizer", QWEN_TOOLS)
    encoder = spec.build()
    for row, encoded in zip(rows, encoder.encode([line(row) for row in rows]), strict=True):
        counted = [part.partition("⟧")[0] for part in marked(spec, encoded).split("⟦")[1:]]
        assert counted == [f"{text}<|im_end|>" for text in said_by_the_assistant(row)]

    data, run_dir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for split in ("train", "val"):  # all 32 are trained on
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"max_context_width": 256, "hidden_width": 128, "intermediate_size": 256}
    flags = {"lr": 4e-3, "warmup": 0.05, "weight_decay": 0, "checkpoint_freq": None}
    train_well(dataset=data, tokenizer=spec.tokenizer_path, run_dir=run_dir, max_steps=150, **shape, **flags)
    assert steps(run_dir)[-1]["loss"] < 0.05

    for row in (rows[3], rows[20]):
        question, answer = (turn["content"] for turn in row["messages"])
        capsys.readouterr()
        assert main(["chat", str(run_dir), "--temperature=0", "--prompt", question]) == 0
        assert capsys.readouterr().out == f"{answer}\n"
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    row = rows[-1]
    question = row["messages"][0]["content"]
    assert typed(run_dir, question, "--tools", str(tools)) == f"{said_by_the_assistant(row)[0]}\n"
