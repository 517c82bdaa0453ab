"""Each recipe's own file, shrunk by flags: two ranks fine-tune a tiny model of its architecture, to its answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.data.chat_shapes import LLAMA4, R1, save_tokenizer
from tests.hf_folders import write_hf_folder
from tests.integration.processes import environment, steps
from tests.jobs import config_of
from tests.rank_pool import RankPool
from tests.recipes.test_recipe_files import DPO, QWEN, SCOUT
from tests.train.test_dpo import write_pairs
from tests.train.test_lora import frozen_facts
from tests.train.test_qlora import write_dequantised

from hypershard.adapters.targets import nf4_formats
from hypershard.cli.main import main
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.metrics.sinks import read_json_lines
from hypershard.models.family import family_of

pytestmark = pytest.mark.slow

ANSWERS = {
    f"What is kept in house {number}?": f"House {number} keeps {what}."
    for number, what in enumerate(["amber", "basalt"])
}
# Wide enough apart for the frozen random weights to tell one token from another.
SMALL = "--hidden_width 64 --intermediate_size 128 --max_context_width 128 --initializer_range 0.3"
SHORT = "--max_steps 24 --global_batch_tokens 512 --validation_freq 6 --validation_batches 2 --lr 0.01"
CASES = {
    # Every fourth layer sees the whole conversation (34 tokens or so), without rope; the others chunks of it.
    SCOUT: (
        "--model tiny_llama4 --num_experts 16 --num_layers 4 --attention_chunk_size 16 --max_context_width 64",
        LLAMA4.replace("\n\n", "\n"),
        "<|eot|>",
        " --global_batch_tokens 128",
    ),
    QWEN: (
        "--model tiny_qwen2 --num_layers 1",
        R1,
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek writes a wide bar
        f" --chat_template {QWEN.parent / 'deepseek_r1_whole_answers.jinja'}",
    ),
}


def write_base(folder: Path, recipe: Path, cache_dir: Path) -> str:
    """A model folder with tokenizer and template, whose values NF4 has: merged and trained are one model.

    Returns the flags of its shape.
    """
    from transformers import AutoModelForCausalLM

    family, template, eos, _ = CASES[recipe]
    num_ids = load_tokenizer(save_tokenizer(folder, template, eos=eos)).vocab_size
    named = folder / "tokenizer_config.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "bos_token": "<s>"}))  # as transformers reads it too
    shape = f"--config {recipe} {SMALL} {family} --vocab_size {num_ids + num_ids % 2}"  # two ranks have equal shares
    config = config_of(shape, cache_dir=cache_dir)
    torch.manual_seed(0)
    whole = folder.with_name("whole")
    hf_config = family_of(config.model.model_type).hf_config(config.model)
    AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(whole)
    write_dequantised(whole, folder, nf4_formats(config.model, config.adapters))
    return shape


def write_conversations(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    for name, times in (("train", 12), ("val", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * times))
    return folder


def answer_of_transformers(folder: Path, question: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    found = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("recipe", CASES, ids=lambda path: path.stem)
def test_a_recipe_from_the_base_to_an_answer(
    pools: Callable[[int], RankPool], tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    base, cache_dir, run_dir = tmp_path / "base", tmp_path / "cache", tmp_path / "run"
    shape = write_base(base, recipe, cache_dir)
    data = write_conversations(tmp_path / "data")
    flags = f"{shape} {SHORT} --init_from {base} --dataset {data}{CASES[recipe][3]}"

    # In the ranks: what is frozen takes half a byte where it is packed, experts too, and stays.
    config = config_of(flags, cache_dir=cache_dir)
    formats = nf4_formats(config.model, config.adapters)
    packed = sum(layout.num_bytes for layout in formats.values())
    experts = [layout for layout in formats.values() if len(layout.shape) == 3]
    assert len(experts) == (8 if recipe == SCOUT else 0) and all(layout.shape[0] == 16 for layout in experts)
    for found in pools(2).run(frozen_facts, flags, cache_dir):
        assert found["unchanged"] and not found["gradients"]
        others = found["numbers"] - packed // 2  # parameters of bfloat16 that hold bytes
        assert found["bytes"] * 2 == 2 * others + packed
        assert all("lora_" in name for name in found["names"])

    # As a user starts it.
    words = [*flags.split(), f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", "--keep_checkpoints=1"]
    command = [sys.executable, "-m", "hypershard.cli.main", "train", *words, "--nproc_per_node=2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in steps(run_dir)]
    assert losses[0] > 5 and losses[-1] < losses[0] / 5
    validated = {
        record["step"]: record["validation_loss"]
        for record in read_json_lines(run_dir / "metrics.jsonl")
        if "validation_loss" in record
    }
    kept = {int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*")}
    assert len(validated) == 4 and min(validated.values()) < 0.5, validated
    assert kept == {min(validated, key=lambda step: validated[step]), max(validated)}

    merged, question = tmp_path / "merged", list(ANSWERS)[1]
    capsys.readouterr()
    assert main(["chat", str(run_dir), "--temperature=0", "--max_new_tokens=24", "--prompt", question]) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    assert answer in ANSWERS.values()  # so short a training tells the houses apart on some machines, not on all
    export = ["checkpoint", "export", str(run_dir), "--dtype=float32", "--num_workers=1", f"--output={merged}"]
    assert main(export) == 0
    assert answer_of_transformers(merged, question) == answer


def test_the_preference_recipe_from_the_base_to_an_export(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user starts it: pairs are learnt, told in every record and in the report, and exported."""
    base, run_dir, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    shape = f"--config {DPO} --model tiny_llama --num_layers 1 {SMALL} --max_position_embeddings 128"
    write_hf_folder(base, shape, cache_dir=cache_dir)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    flags = f"{shape} --global_batch_tokens 512 --max_steps 10 --validation_freq 5 --validation_batches 2 --lr 0.003"
    words = [*f"{flags} --init_from {base} --dataset {pairs}".split(), f"--cache_dir={cache_dir}"]
    command = [sys.executable, "-m", "hypershard.cli.main", "train", *words, f"--run_dir={run_dir}"]
    command.append("--nproc_per_node=2")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    records = read_json_lines(run_dir / "metrics.jsonl")
    trained = [record for record in records if "loss" in record]
    assert trained[0]["preference_accuracy"] == 0 and trained[-1]["preference_accuracy"] == 1
    assert trained[-1]["loss"] < trained[0]["loss"] / 2 and trained[-1]["reward_margin"] > 1
    validated = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validated] == [5, 10]
    assert validated[-1]["validation_preference_accuracy"] == 1
    assert main(["report", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "preferred" in shown
    assert main(["checkpoint", "export", str(run_dir), "--num_workers=1", f"--output={merged}"]) == 0
    assert (merged / "model.safetensors").exists()
