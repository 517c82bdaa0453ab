"""`hypershard plan` for a time window and a data set: what is planned is what the planner says, and train takes it."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hypershard.cli import data as data_verb
from hypershard.cli import prepare as prepare_verb
from hypershard.cli import train as train_verb
from hypershard.cli.plan import plan_of, run
from hypershard.config.flags import parse
from hypershard.config.schema import Config
from hypershard.errors import ConfigError, HypershardError

JOB = ("--model=llama3_8b", "--instance=p5")
SAMPLES = ("--num_samples=2198", "--tokens_per_sample=900")


@pytest.fixture(autouse=True)
def no_calibrations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]):
    def ask(*words: str) -> str:
        assert run(words) == 0
        return capsys.readouterr().out

    return ask


@pytest.fixture
def values(answer):
    return lambda *words: json.loads(answer(*words, "--json"))


def config_of(command: str) -> Config:
    """What `hypershard train` makes of the flags of a command, its own checks included."""
    program, verb, *flags = shlex.split(command)
    assert (program, verb) == ("hypershard", "train")
    namespace: argparse.Namespace = parse(train_verb.build_parser(), flags)
    return train_verb.resolve_arguments(namespace)[0].config


def test_the_command_is_one_that_train_takes_and_plan_agrees_with(values) -> None:
    found = values(*JOB, *SAMPLES, "--max_hours=12", "--epochs=3", "--profile=balanced", "--dataset=chats.jsonl")
    config, estimate = config_of(found["job"]["command"]), found["estimate"]
    assert (config.train.max_steps, config.train.max_hours) == (estimate["num_steps"], 12)
    assert (config.data.dataset, config.data.epochs) == ("chats.jsonl", 3)
    assert config.data.train_batch_size * config.data.gradient_accumulation_steps * 8 == estimate["samples_per_step"]
    assert (config.optim.lr_decay_style, config.checkpoint.checkpoint_freq) == ("wsd", None)
    planned = plan_of([*shlex.split(found["job"]["command"])[2:], "--instance=p5"])
    assert planned.memory.verdict == "fits" and planned.num_steps == estimate["num_steps"]
    # The window's step is the planner's, and what saves add; its hours are these steps and what comes once.
    assert planned.step is not None and planned.window is not None
    beside = found["overheads"]["each_step_seconds"]
    assert estimate["step_seconds"] == pytest.approx(planned.step.seconds + sum(beside.values()))
    assert planned.window.overheads.each_step == pytest.approx(beside)
    seconds = sum(found["overheads"]["once_seconds"].values()) + estimate["num_steps"] * estimate["step_seconds"]
    assert estimate["estimated_hours"] == pytest.approx(seconds / 3600)
    assert found["cost"]["dollars"] == pytest.approx(seconds / 3600 * 55.04)
    assert found["window"] == {"max_hours": 12, "reserve_hours": 0.5, "available_hours": 11.5}


def test_the_machine_decides_the_micro_batch_and_the_hours(values) -> None:
    words = ("--model=llama3_2_3b", *SAMPLES, "--max_hours=12", "--profile=fast")
    large, small = (values(*words, f"--instance={where}") for where in ("p5.48xlarge", "g5.48xlarge"))
    batches = [one["profile"]["training_arguments"]["train_batch_size"] for one in (large, small)]
    assert batches[0] > batches[1] >= 1
    assert large["estimate"]["samples_per_step"] == small["estimate"]["samples_per_step"] == 32
    assert 3 * large["estimate"]["step_seconds"] < small["estimate"]["step_seconds"]
    at_speed = values(*words, "--instance=p5", "--hours_at=1000")
    assert at_speed["level"] == "measured speed"
    assert at_speed["estimate"]["step_seconds"] > 10 * large["estimate"]["step_seconds"]


def test_steps_give_way_and_the_page_says_it_all(answer, tmp_path: Path) -> None:
    file = tmp_path / "window.json"
    words = (*JOB, "--num_samples=2e6", "--tokens_per_sample=900", "--max_hours=12", "--profile=fast")
    page = answer(*words, f"--report={file}")
    report = json.loads(file.read_text())
    estimate = report["estimate"]
    assert estimate["num_steps"] < estimate["asked_steps"] and estimate["fits_in_window"]
    assert estimate["estimated_hours"] <= 11.5 < estimate["estimated_hours"] + 2 * estimate["step_seconds"] / 3600
    assert estimate["low_hours"] < estimate["estimated_hours"] < estimate["high_hours"]
    for expected in (
        "2,000,000 samples speak for the profile fast and 2 epochs",
        f"{estimate['num_steps']:,} steps",
        "12 h, of which 0.5 h are kept in reserve: fits; at worst it does not",
        "memory   fits: ",
        f"= ${report['cost']['dollars']:,.2f}",
        "assumed  start takes 120 s; each node reads and writes checkpoints at 1 GB/s",
        f"train    {report['job']['command']}",
    ):
        assert expected in page
    unfit = answer(*words, "--give_way=nothing")
    assert "kept in reserve: does not fit" in unfit and f"{estimate['asked_steps']:,} steps, 2.00 epochs" in unfit


def test_a_training_config_asks_and_flags_go_before_it(values, tmp_path: Path) -> None:
    file = tmp_path / "training_config.json"
    asked = {
        "num_train_epochs": 2.5,
        "optimization_priority": "balanced",
        "max_training_hours": 6,
        "base_model": "llama3_2_3b",
    }
    file.write_text(json.dumps(asked))
    words = (f"--training_config={file}", "--instance=p5", "--num_samples=20000", "--tokens_per_sample=500")
    found = values(*words)
    assert (found["job"]["model"], found["window"]["max_hours"]) == ("llama3_2_3b", 6)
    assert (found["profile"]["name"], found["estimate"]["asked_epochs"]) == ("balanced", 2.5)
    found = values(*words, "--model=llama3_2_1b", "--max_hours=3", "--profile=fast", "--epochs=1")
    assert (found["job"]["model"], found["window"]["max_hours"]) == ("llama3_2_1b", 3)
    assert (found["profile"]["name"], found["estimate"]["asked_epochs"]) == ("fast", 1)


def test_what_the_user_says_of_schedule_saves_and_profile_stands(values, tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    shape = {"train_batch_size": 1, "gradient_accumulation_steps": 64, "max_context_width": 3072}
    own.write_text(json.dumps(shape))
    words = (*JOB, *SAMPLES, "--max_hours=12", f"--profile={own}", "--lr_decay_style=cosine", "--checkpoint_freq=50")
    found = values(*words)
    config = config_of(found["job"]["command"])
    assert (config.optim.lr_decay_style, config.optim.plateau, config.checkpoint.checkpoint_freq) == ("cosine", 0, 50)
    assert found["estimate"]["samples_per_step"] == 64 and config.model.max_context_width == 3072


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--profile=fast", *SAMPLES], "give its hours, --max_hours"),
        (["--profile=fast", "--max_hours=12"], "by --num_samples and --tokens_per_sample"),
        (["--profile=fast", "--max_hours=12", "--dataset_tokens=1e9"], "by --num_samples and --tokens_per_sample"),
        (["--profile=fast", "--max_hours=12", *SAMPLES, "--train_batch_size=2"], "the profile decides it"),
        (["--profile=fast", "--max_hours=12", *SAMPLES, "--packing=none"], "--packing=none: a profile"),
        (["--profile=fast", "--max_hours=12", *SAMPLES, "--max_steps=2"], "--epochs says how much is wanted"),
        (["--profile=fastest", "--max_hours=12", *SAMPLES], "expected one of auto, fast, balanced"),
        (["--profile=fast", "--max_hours=0.01", *SAMPLES], "does not hold one step"),
        (["--max_hours=12", "--tokens_per_sample=900"], "--tokens_per_sample with --num_samples"),
        ([*SAMPLES, "--dataset_facts=facts.json"], "and so does --num_samples"),
        (["--dataset_facts=facts.json"], "No such file"),
        (["--num_samples=2.5"], "--num_samples=2.5: expected a whole number"),
        (["--search", "--max_steps=9", "--profile=fast"], "--profile does not go with --search"),
        (["--attention=varlen", "--bf16=0", "--peak_tflops_per_gpu=60"], "the flash kernel computes in bfloat16"),
        (
            ["--attention=varlen", "--bf16=0", "--peak_tflops_per_gpu=60", *SAMPLES, "--max_hours=12"],
            "the flash kernel computes in bfloat16",
        ),
    ],
)
def test_refusals_say_what_is_missing(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run([*JOB, *words])


def test_hours_alone_say_how_many_steps_there_are(values, answer) -> None:
    words = (*JOB, "--activation_checkpointing=1", "--validation_freq=100")
    by_hours = values(*words, "--max_hours=12")
    window, step = (
        by_hours["window"],
        by_hours["time"]["step_seconds"] + sum(by_hours["window"]["each_step_seconds"].values()),
    )
    taken = sum(window["once_seconds"].values()) + by_hours["num_steps"] * step
    assert taken <= 11.5 * 3600 < taken + step
    assert by_hours["num_steps"] == window["num_steps"]
    assert by_hours["hours"] == pytest.approx(by_hours["num_steps"] * by_hours["time"]["step_seconds"] / 3600)
    assert window["each_step_seconds"]["validations"] > 0
    assert f"{window['num_steps']:,} steps fit into 12 h less 0.5 h in reserve" in answer(*words, "--max_hours=12")
    fewer = values(*words, "--max_hours=12", "--max_steps=100")
    assert (fewer["num_steps"], fewer["window"]["num_steps"]) == (100, window["num_steps"])
    capped = values(*words, "--max_hours=12", "--max_steps=1e6", "--dataset_tokens=6e11")
    assert capped["num_steps"] == window["num_steps"]
    assert values(*words, "--max_hours=2")["window"]["reserve_hours"] == pytest.approx(0.1)
    assert plan_of([*words, "--max_hours=12"]).most_hours == 12


def test_token_bins_tell_their_sizes(values, answer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, bins = tmp_path / "text.jsonl", tmp_path / "bins"
    text.write_text("".join(json.dumps({"text": f"words {number} " * 99}) + "\n" for number in range(300)))
    assert prepare_verb.run([str(text), f"--output={bins}", "--num_processes=1"]) == 0
    capsys.readouterr()
    words = ("--model=tiny_llama", "--instance=g5.12xlarge", f"--dataset={bins}")
    told = json.loads((bins / "meta.json").read_text())["train"]
    found = values(*words, "--epochs=6")
    data = found["dataset"]
    assert (data["num_samples"], data["num_tokens"]) == (told["num_documents"], told["num_tokens"])
    assert data["mean_tokens"] == pytest.approx(told["num_tokens"] / told["num_documents"])
    assert found["num_steps"] == 6 * told["num_tokens"] // found["job"]["step_tokens"]
    assert data["epochs"] == pytest.approx(6, abs=1 / data["steps_per_epoch"])
    assert [one["code"] for one in data["warnings"]] == ["repetition"]
    assert "arXiv:2305.16264" in answer(*words, "--epochs=6")
    with pytest.raises(ConfigError, match="vocab_size=100 is smaller than the tokenizer's 4096"):
        run([*words, "--vocab_size=100"])


def test_an_analysis_tells_what_is_in_files(values, answer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, facts = tmp_path / "text.jsonl", tmp_path / "facts.json"
    text.write_text("".join(json.dumps({"text": f"line {number} of some text"}) + "\n" for number in range(200)))
    words = ("--model=tiny_llama", "--vocab_size=4096", "--instance=g5.12xlarge", "--max_steps=10")
    command = answer(*words, f"--dataset={text}").partition("`hypershard data ")[2].partition(" >")[0]
    assert data_verb.run(shlex.split(command)) == 0
    facts.write_text(capsys.readouterr().out)
    analysed = json.loads(facts.read_text())["datasets"][0]
    data = values(*words, f"--dataset_facts={facts}")["dataset"]
    assert (data["num_samples"], data["num_tokens"]) == (200, analysed["num_tokens"])
    assert data["longest_tokens"] == analysed["lengths"]["maximum"]
    for content, expected in (('{"datasets": []}', "found 0 data sets"), ('{"datasets": [{}]}', "incomplete or wrong")):
        facts.write_text(content)
        with pytest.raises(HypershardError, match=expected):
            run([*words, f"--dataset_facts={facts}"])


def test_a_small_set_read_often_is_warned_of(values) -> None:
    words = ("--max_steps=200", "--global_batch_tokens=196608", "--max_context_width=3072")
    data = values(*JOB, *SAMPLES, *words)["dataset"]
    assert data["unpacked_epochs"] == pytest.approx(200 * 64 / 2198)
    assert data["epochs"] == pytest.approx(200 * 64 / (2198 * 900 // 3072))
    assert [one["code"] for one in data["warnings"]] == ["small_set", "epochs"]
    assert "(5.8 where a sequence holds one sample)" in data["warnings"][1]["text"]
    assert values(*JOB, *SAMPLES, "--max_steps=10", *words[1:])["dataset"]["warnings"][1:] == []


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from hypershard.cli.plan import run\n"
        "run(['--model=llama3_8b', '--instance=p5', '--num_samples=99', '--tokens_per_sample=900', '--max_hours=9'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "profile  quality" in shown
