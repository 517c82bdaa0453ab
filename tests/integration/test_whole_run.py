"""A run from the first command to a model that others load: what the README shows, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.processes import environment, history, train, train_well

from hypershard.metrics.sinks import read_json_lines

pytestmark = pytest.mark.slow


def verb(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hypershard.cli.main", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    flags = {
        "max_steps": 30,
        "checkpoint_freq": 10,
        "validation_freq": 10,
        "tensorboard_dir": None,
        "keep_checkpoints": 2,
    }
    train_well(run_dir=run_dir, nproc_per_node=2, train_batch_size=8, logging_freq=3, **flags)
    return run_dir


def test_the_run_directory_is_complete(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.yaml",
        "code.txt",
        "plan.json",
        "actual.json",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "tensorboard",
        "tokenizer",
        "checkpoints",
    }
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    kinds = [record["event"] for record in read_json_lines(run_dir / "events.jsonl")]
    # How many saves there are depends on the machine: one that is due while another is being written comes later.
    assert kinds[0] == "started" and kinds[-1] == "stopped" and set(kinds[1:-1]) == {"saved"}
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names >= {"run-id", "config.yaml", "tokenizer", "step-00000030"}
    assert len(names) == 5, "two checkpoints are kept"


def test_the_plan_is_held_against_what_came(run_dir: Path) -> None:
    planned, actual = (json.loads((run_dir / name).read_text()) for name in ("plan.json", "actual.json"))
    assert (planned["num_steps"], planned["job"]["num_gpus"], planned["job"]["gpu"]) == (30, 2, "CPU")
    assert planned["memory"]["verdict"] == "fits"
    last = read_json_lines(run_dir / "metrics.jsonl")[-2]
    assert (actual["steps"], actual["tokens"], last["last_step"]) == (30, last["tokens"], 30)
    assert actual["hours"]["actual"] == last["training/elapsed_hours"] == last["optimization/actual_hours"]
    # A CPU's closed form is a guess: after 25 steps the measured pace is what the run is held to.
    early = read_json_lines(run_dir / "metrics.jsonl")[0]
    assert "optimization/estimated_hours" not in early and early["training/remaining_hours"] > 0
    assert actual["hours"]["time_accuracy"] == last["optimization/time_accuracy"] > 0
    assert f"{last['optimization/time_accuracy']:.0%}" in verb("report", run_dir)


def test_metrics_have_their_keys_and_the_loss_falls(run_dir: Path) -> None:
    records = read_json_lines(run_dir / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == list(range(3, 31, 3))
    wanted = {"step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second", "mfu", "memory_bytes"}
    wanted |= {"data_seconds", "padding"}
    assert all(wanted <= set(record) for record in training)
    assert training[-1]["tokens"] == 30 * 2 * 8 * 64
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    validations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validations] == [10, 20, 30]
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"]


def test_tensorboard_has_the_same_numbers(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    expected = {
        record["step"]: record["loss"] for record in read_json_lines(run_dir / "metrics.jsonl") if "loss" in record
    }
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_config_file_starts_the_same_run(run_dir: Path, tmp_path: Path) -> None:
    words = ["train", "--config", run_dir / "config.yaml", "--run_dir", tmp_path / "again", "--max_steps", 6]
    verb(*words, "--lr_decay_iters", 30, "--nproc_per_node", 2)
    assert history(tmp_path / "again") == history(run_dir)[:2]


def test_report_and_checkpoint_verbs(run_dir: Path) -> None:
    shown = verb("report", run_dir)
    assert "at step 30" in shown and "steps 20, 30" in shown and str(run_dir) in shown
    assert verb("checkpoint", "list", run_dir).count("complete") == 2
    assert verb("checkpoint", "verify", run_dir).count(": valid") == 2


def test_eval_only_gives_the_last_validation_loss(run_dir: Path, tmp_path: Path) -> None:
    last = read_json_lines(run_dir / "metrics.jsonl")[-1]["validation_loss"]
    flags = {"eval_only": 1, "resume_from_checkpoint": run_dir / "checkpoints", "train_batch_size": 8}
    output = train_well(run_dir=tmp_path / "eval", nproc_per_node=2, **flags)
    assert f"validation loss {last:.4f}" in output
    # In the run's own folder, from an older checkpoint: nothing of the run may be lost by looking at it.
    before = [(run_dir / name).read_text() for name in ("metrics.jsonl", "config.yaml")]
    flags["resume_from_checkpoint"] = run_dir / "checkpoints" / "step-00000020"
    train_well(run_dir=run_dir, nproc_per_node=2, **flags)
    after = [(run_dir / name).read_text() for name in ("metrics.jsonl", "config.yaml")]
    assert after[0].startswith(before[0]) and after[1] == before[1]
    for flags in ({"init_from": "resume"}, {"eval_only": 1, "resume_from_checkpoint": "auto"}):
        code, output = train(run_dir=tmp_path / "none", **flags)
        assert code == 2 and "found no checkpoint" in output


def test_the_export_loads_elsewhere_and_the_model_writes(run_dir: Path, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    verb("checkpoint", "export", run_dir, "--output", tmp_path / "model", "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The value of", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    first = verb("generate", run_dir, "--prompt", "The value of", "--max_new_tokens", 8)
    assert first.startswith("The value of") and len(first) > len("The value of\n")
    assert verb("generate", run_dir, "--prompt", "The value of", "--max_new_tokens", 8) == first
    # The exported folder goes on as a start: its first loss is the run's next, not a fresh model's.
    flags = {"init_from": tmp_path / "model", "max_steps": 1, "train_batch_size": 8}
    tokenizer_file = tmp_path / "model" / "tokenizer.json"
    own = tokenizer_file.read_text()
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tokenizer_file))
    code, output = train(run_dir=tmp_path / "other", nproc_per_node=1, tokenizer=run_dir / "tokenizer", **flags)
    assert code == 2 and "has a tokenizer of its own" in output
    tokenizer_file.write_text(own)
    train_well(run_dir=tmp_path / "tuned", nproc_per_node=2, **flags)
    assert history(tmp_path / "tuned")[0][1] < history(run_dir)[0][1] - 0.3
