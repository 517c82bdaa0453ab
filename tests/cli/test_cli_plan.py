"""`hypershard plan`: a page or JSON, without torch, for what `train` would take."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hypershard.plan
from hypershard.cli import launch
from hypershard.cli.plan import plan_of, run
from hypershard.errors import ConfigError
from hypershard.models.files import available_models


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(words) == 0
    return capsys.readouterr().out


def test_the_page_has_all_a_person_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama3_8b", "--instance", "ml.p5.48xlarge", "--nodes", "4", "--max_steps", "10000")
    page = answer(capsys, *words)
    for expected in ("8,030,261,248 parameters", "verdict  fits", "4 x p5.48xlarge", "MFU", "tokens/s per GPU"):
        assert expected in page
    assert "closed form, +-12%" in page and "closed form, +-30%" in page
    assert "[closed form, +-30%; sagemaker: $63.30/h" in page and "2.621B tokens" in page


def test_what_does_not_fit_names_the_flags_that_make_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama3_8b", "--instance", "g5.12xlarge"]
    page = answer(capsys, *words)
    assert "verdict  does not fit" in page
    flags = next(line for line in page.splitlines() if "it fits with --" in line).partition("with ")[2].split()
    assert "verdict  fits" in answer(capsys, *words, *flags)


@pytest.mark.parametrize("name", available_models())
def test_every_model_file_by_its_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = json.loads(answer(capsys, "--model", name, "--instance", "p5en", "--nodes", "2", "--json"))
    assert found["level"] == "closed form" and found["job"]["num_gpus"] == 16
    assert found["memory"]["verdict"] and found["time"]["step_seconds"] > 0
    assert found["hours"] is None and found["cost"]["dollars"] is None


def test_prices_speed_and_data_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("p5.48xlarge: {ec2: 20.0}\n")
    words = ["--model", "llama3_8b", "--instance", "p5", "--prices_file", str(prices), "--json"]
    words += ["--dataset_tokens", "3e9", "--epochs", "2", "--hours_at", "10000"]
    found = json.loads(answer(capsys, *words))
    assert found["hours_level"] == "measured speed"
    assert found["num_steps"] == 6_000_000_000 // (8 * 8192)
    assert found["hours"] == pytest.approx(6e9 / 8 / 10_000 / 3600, rel=1e-4)
    assert found["cost"]["dollars"] == pytest.approx(found["hours"] * 20)


def test_an_unknown_price_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama3_8b", "--instance", "p5e", "--max_steps", "5")
    assert "price unknown" in answer(capsys, *words)
    assert json.loads(answer(capsys, *words, "--json"))["cost"]["dollars"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "llama3_8b"], "--instance is missing"),
        (["--model", "llama3_8b", "--instance", "p5", "--nodes", "0"], "--nodes=0"),
        (["--model", "llama3_8b", "--instance", "p5", "--nodes", "1.5"], "--nodes=1.5"),
        (["--model", "llama3_8b", "--instance", "p5", "--hours_at", "fast"], "--hours_at=fast"),
        (["--model", "llama3_8b", "--instance", "p9"], "no instance type of this name"),
        (["--model", "llama3_8b", "--instance", "p5", "--train_batchsize", "2"], "did you mean --train_batch_size"),
        (["--model", "llama3_8b", "--instance", "p5", "--node", "2"], "did you mean --nodes"),
        (["--model", "llama3_8b", "--instance", "p5", "--deadline", "5"], "--deadline acts only with --search"),
        (["--model", "llama3_8b", "--search"], "--global_batch_tokens"),
        (["--model", "llama3_8b", "--search", "--instance", "p5,g5.xlarge"], "--global_batch_tokens"),
        (["--model", "llama3_8b", "--search", "--instance", "p5,ml.p4d"], "--service"),
        (["--model", "llama3_8b", "--search", "--instance", "p5", "--nodes", "1,0"], "--nodes=0"),
        (["--model", "llama3_8b", "--search", "--instance", "p5", "--max_hours", "5"], "--max_hours does not go"),
        (["--model", "llama3_8b", "--search", "--instance", "p5", "--profile", "fast"], "--profile does not go"),
        (["--model", "llama3_8b", "--search", "--instance", "p5", "--deadline", "5"], "--max_steps"),
        (["--model", "llama3_8b", "--search", "--instance", "p5", "--picture", "a.jpg"], r"\.png or \.svg"),
        (["--hidden_width", "256", "--dataset", "x.txt", "--instance", "p5"], "--vocab_size is open"),
    ],
)
def test_refusals_name_the_flag(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(words)


def test_it_plans_without_torch() -> None:
    code = (
        "import sys; from hypershard.cli.plan import run\n"
        "words = ['--model', 'llama4_scout_17b_16e', '--instance', 'p5', '--max_steps', '10']\n"
        "run(words)\n"
        "run([*words, '--search'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "107,769,861,120 parameters" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["num_parameters=1.29e9", "num_tokens=85e9", "loss_nats=2.37"], 0, "holds"),
        (["num_parameters=1.29e9", "num_tokens=6e9", "loss_nats=2.37"], 1, "expected 2.70 nats"),
        (["published=llama3_2_3b", "intermediate_size=11008"], 1, "3.939B parameters, and it has 3.213B"),
        (["published=gpt2_1_36b", "num_heads=18"], 1, "does not divide"),
        (["num_tokens=6e9"], 0, "nothing could be compared"),
    ],
)
def test_claims_are_checked(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--check", *words]) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("word", ["losses=2", "loss_nats=low", "loss_nats"])
def test_what_is_no_claim_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--check loss"):
        run(["--check", word])


def test_a_sagemaker_job_may_take_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model llama3_8b --instance p5 --nodes 4 --role arn:aws:iam::123456789012:role/train --output s3://runs/a"
    words += " --image 123456789012.dkr.ecr.us-west-2.amazonaws.com/hypershard:0.1 --dry_run"
    limits = []
    for flags in ("--max_steps=20000", "--max_steps=40000", "", "--max_steps=20000 --hours=9"):
        assert launch.run(["sagemaker", *words.split(), *flags.split()]) == 0
        limits.append(json.loads(capsys.readouterr().out)["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600)
    planned = plan_of(["--model=llama3_8b", "--instance=p5", "--nodes=4", "--max_steps=20000"]).most_hours
    assert planned is not None and 1 <= limits[0] - planned < 2
    assert limits[1] > 1.5 * limits[0]
    assert limits[2:] == [24, 9]


SEARCH = (
    "--search",
    "--model",
    "llama3_8b",
    "--global_batch_tokens",
    "524288",
    "--instance",
    "p4d,p5,p5e",
    "--nodes=8",
)


@pytest.mark.parametrize(
    ("words", "service"),
    [
        (("--max_steps=5000", "--seed=7", "--deadline=1000"), "ec2"),
        (("--epochs=2", "--dataset_tokens=4e9", "--activation_checkpointing=full", "--service=sagemaker"), "sagemaker"),
    ],
)
def test_a_winners_flags_are_planned_alike_and_launched(
    words: tuple[str, ...], service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(answer(capsys, *SEARCH, *words, "--json"))
    assert found["service"] == service and set(found["winners"]) >= {"fastest", "cheapest"}
    for one in found["winners"].values():
        tokens = [word for word in words if word.startswith("--dataset_tokens")]
        made = json.loads(answer(capsys, *one["flags"], *tokens, "--json"))
        assert made["memory"]["verdict"] == one["verdict"] and made["job"]["accumulation"] == one["accumulation"]
        assert made["hours"] == pytest.approx(one["hours"]) and made["job"]["step_tokens"] == 524288
        assert made["cost"]["dollars"] == (one["dollars"] and pytest.approx(one["dollars"]))
        assert launch.run(["slurm", *one["flags"], "--dry_run"]) == 0
        assert f"#SBATCH --nodes={one['num_nodes']}\n" in capsys.readouterr().out
    if service == "sagemaker":
        assert all(one["activation_checkpointing"] == "full" for one in found["candidates"])


def test_the_searchs_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pictures = [tmp_path / "costs.png", tmp_path / "costs.svg"]
    for picture in pictures:
        page = answer(capsys, *SEARCH, "--max_steps", "5000", "--deadline", "0.1", "--picture", str(picture))
    for expected in (
        "524,288 tokens in every step; 5,000 steps, 2.621B tokens",
        "\nfastest ",
        "\ncheapest ",
        "unknown",
    ):
        assert expected in page
    assert "nothing of known price is done in 0.1 h; nearest: " in page
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    drawn = pictures[1].read_text()
    for word in ("p4d", "p5", "cheapest:", "deadline 0.1 h", "unknown prices: p5e"):
        assert word in drawn


def test_a_search_without_a_length_ranks_by_tokens_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--search", "--model", "llama3_8b", "--instance", "p5", "--nodes", "1,2,3", "--train_batch_size", "2")
    page = answer(capsys, *words)
    assert "of 10^9 tokens; give --max_steps" in page and "393,216 tokens in every step" in page
    found = json.loads(answer(capsys, *words, "--json"))
    assert found["num_steps"] is None and found["winners"]["cheapest"]["dollars"] is None
    assert {one["num_nodes"] for one in found["candidates"]} == {1, 2, 3}
    speeds = [one["tokens_per_second"] for one in found["candidates"]]
    assert found["winners"]["fastest"]["tokens_per_second"] == max(speeds)
    price = found["winners"]["cheapest"]["dollars_per_billion_tokens"]
    assert price == min(one["dollars_per_billion_tokens"] for one in found["candidates"] if one["verdict"] == "fits")


def test_the_readmes_search_prints_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # no calibrations of this machine's
    section = (Path(hypershard.plan.__file__).parent / "README.md").read_text().partition("\n## Search\n")[2]
    block = section.partition("```console\n$ hypershard plan ")[2].partition("```")[0].replace("\\\n", "")
    command, *shown = block.splitlines()
    printed = answer(capsys, *shlex.split(command)).splitlines()
    assert len(shown) > 8
    assert [line for line in shown if line != "…" and line not in printed] == []


def test_nf4_that_is_not_compiled_is_told_what_compiling_gains(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model=llama3_8b", "--instance=p4d", "--lora_r=16", "--activation_checkpointing=1"]
    in_nf4 = [*words, "--bnb_quant_type=nf4"]
    told = re.search(r"--compile=1 would take a step from (\S+) s to (\S+) s", answer(capsys, *in_nf4))
    assert told is not None
    plain, compiled = (plan_of([*in_nf4, *more]).step for more in ([], ["--compile=1"]))
    assert plain is not None and compiled is not None and compiled.seconds < 0.9 * plain.seconds
    assert told.groups() == (f"{plain.seconds:.3g}", f"{compiled.seconds:.3g}")
    for flags in (words, [*in_nf4, "--compile=1"]):
        assert "--compile" not in answer(capsys, *flags)


def test_samples_that_are_not_packed_have_a_sequence_each(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model=llama3_8b", "--instance=p5", "--num_samples=10000", "--global_batch_tokens=524288", "--epochs=2")
    tokens = "--tokens_per_sample=900"
    assert "--num_samples and --tokens_per_sample" in answer(capsys, *words)
    packed = json.loads(answer(capsys, *words, tokens, "--json"))
    assert packed["num_steps"] == 2 * (10_000 * 900 // 8192) * 8192 // 524288
    for known in ((), (tokens,)):
        alone = json.loads(answer(capsys, *words, *known, "--packing=none", "--json"))
        assert alone["num_steps"] == 2 * 10_000 * 8192 // 524288
        assert alone["dataset"]["epochs"] == alone["dataset"]["unpacked_epochs"] == pytest.approx(2, abs=0.01)


def test_the_page_tells_what_the_compute_would_do_best_with(capsys: pytest.CaptureFixture[str]) -> None:
    """10^4 steps of 524,288 tokens: of a dense model that starts anew, and of no other."""
    words = ["--model=llama3_8b", "--instance=p5", "--nodes=4", "--train_batch_size=2", "--activation_checkpointing=1"]
    assert run([*words, "--max_steps=10000"]) == 0
    said = capsys.readouterr().out
    assert "164.1B tokens for this model, and for this compute 1.374B parameters with 30.64B tokens: 2.44 nats" in said
    assert run([*words, "--max_steps=10000", "--lora_r=16"]) == 0
    assert "compute-optimal" not in capsys.readouterr().out
