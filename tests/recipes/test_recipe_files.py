"""The recipes as files: what they set, where they fit, and the jobs that launchers make of them, with no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.data.chat_shapes import CHATML, save_tokenizer
from tests.jobs import config_of

from hypershard.cli import launch
from hypershard.cli.main import main
from hypershard.cli.plan import plan_of, plan_of_question, question_of
from hypershard.config.schema import Config
from hypershard.config.sources import parse_yaml
from hypershard.errors import ConfigError
from hypershard.launch.sagemaker_environment import flags_of

ROOT = Path(__file__).parents[2]
SCOUT, QWEN = (ROOT / "recipes" / f"{name}.yaml" for name in ("llama4_scout_chat_qlora", "deepseek_r1_qwen_32b_qlora"))
FINE_TUNING = (SCOUT, QWEN)
DPO = ROOT / "recipes" / "llama3_1_8b_dpo.yaml"
INSTANCES = ("ml.g5.12xlarge", "ml.p4d.24xlarge", "ml.p5.48xlarge")
SAGEMAKER = (
    *("--role=arn:aws:iam::111122223333:role/train", "--output=s3://bucket/runs", "--dry_run"),
    "--image=111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1",
)


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def launched(capsys: pytest.CaptureFixture[str], where: str, *words: str) -> tuple[str, str]:
    """What a launcher prints and says."""
    capsys.readouterr()
    assert launch.run([where, *words]) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def set_by(config: Config) -> dict[str, object]:
    train, data, optim, parallel = config.train, config.data, config.optim, config.parallel
    return {
        "lora": (config.adapters.lora_r, config.adapters.lora_alpha, config.adapters.lora_dropout),
        "nf4": (config.adapters.bnb_quant_type, config.adapters.bnb_double_quant),
        "steps": (optim.lr, train.max_steps),
        "sequences": (data.train_batch_size, data.global_batch_tokens, config.model.max_context_width),
        "how": (parallel.activation_checkpointing, parallel.bf16, data.data_kind),
        "kept": (config.checkpoint.keep_best, train.early_stopping_patience, train.validation_texts),
    }


def test_the_recipes_hold_what_was_agreed(cache_dir: Path) -> None:
    both = {"nf4": ("nf4", True), "how": ("full", True, "chat"), "kept": (True, 3, 2)}
    scout, qwen = (set_by(config_of(f"--config {path}", cache_dir=cache_dir)) for path in FINE_TUNING)
    assert scout == both | {"lora": (16, 32, 0.1), "steps": (2e-4, 200), "sequences": (1, 64 * 3072, 3072)}
    assert qwen == both | {"lora": (16, 32, 0.05), "steps": (1e-4, 300), "sequences": (1, 32 * 4096, 4096)}


@pytest.mark.parametrize("recipe", FINE_TUNING, ids=lambda path: path.stem)
@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_request_holds_the_recipe_and_what_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], recipe: Path, instance: str, nodes: int
) -> None:
    made = plan_of([f"--config={recipe}", f"--instance={instance}", f"--nodes={nodes}"])
    data = ("--channel=train=s3://bucket/chats", "--channel=model=s3://bucket/weights")
    words = ["sagemaker", f"--config={recipe}", f"--instance={instance}", f"--nodes={nodes}", *SAGEMAKER, *data]
    more = []
    if made.memory.verdict == "does not fit":
        with pytest.raises(ConfigError, match=r"does not fit: .* are needed and .* it fits with "):
            launch.run(words)
        assert made.remedy is not None
        more = [str(change) for change in made.remedy.changes]
    out, said = launched(capsys, *words, *more)
    assert f"{made.num_steps} steps in " in said and " of a GPU's " in said and " h x $" in said
    request = json.loads(out)
    assert request["ResourceConfig"] == {"InstanceType": instance, "InstanceCount": nodes}
    assert request["TrainingJobName"].startswith(recipe.stem.replace("_", "-"))
    flags = dict(word[2:].split("=", 1) for word in flags_of(request["HyperParameters"]))
    given, model = parse_yaml(recipe.read_text(), where="here")
    assert flags["model"] == model
    # The channels' folders become flags in the container, and flags go before the run file.
    assert "dataset" not in flags and "init_from" not in flags
    written = said.split(f"would write {flags['config']} first:\n")[1]
    assert parse_yaml(written, where="there")[0] == {name: one for name, one in given.items() if name != "init_from"}


def test_preferences_are_planned_and_launched_with_their_reference(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--config={DPO}", "--instance=ml.p4d.24xlarge", "--max_steps=100"]
    compared, alone = plan_of(words), plan_of([*words, "--objective=next_token", "--data_kind=chat", "--dpo_beta=0.1"])
    assert compared.memory.verdict == "fits" and compared.step is not None and alone.step is not None
    assert 1.3 < compared.step.seconds / alone.step.seconds < 1.6
    _, said = launched(capsys, "sagemaker", *words, *SAGEMAKER, "--channel=train=s3://bucket/pairs")
    assert "100 steps in " in said and " h x $" in said


def test_scout_needs_more_than_four_small_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--config={SCOUT}", "--channel=train=s3://bucket/chats", *SAGEMAKER]
    with pytest.raises(ConfigError, match=r"of a GPU's memory .* it fits with --cpu_offload=1, or on 4 nodes as it is"):
        launch.run(["sagemaker", *words, "--instance=ml.g5.12xlarge"])
    with pytest.raises(ConfigError, match=r"global_batch_tokens=196608 is no multiple .* 24 ranks"):
        launch.run(["sagemaker", *words, "--instance=ml.p4d.24xlarge", "--nodes=3"])


@pytest.mark.parametrize("recipe", FINE_TUNING, ids=lambda path: path.stem)
def test_other_clusters_get_the_same_job(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    """Slurm's nodes see the file, pods do not: they get what stands in it."""
    data = ("--init_from=/fsx/weights", "--dataset=/fsx/chats.jsonl", "--dry_run")
    named, there = (f"--config={recipe}", "--instance=p4d"), "--run_dir=/fsx/run"
    out, said = launched(capsys, "slurm", *named, *data)
    assert "plan: fits" in said and f"    --config={recipe}\n" in out and "    --init_from=/fsx/weights\n" in out
    out, _ = launched(capsys, "local", *named, there, *data)
    assert f"--config={recipe} --init_from=/fsx/weights" in out
    words = ("--image=registry/hypershard:1", "--volume=claim:/fsx", there, *named, *data)
    out, said = launched(capsys, "kubernetes", *words)
    assert "plan: fits" in said and "--config" not in out
    args = [line.strip()[len("- --") :] for line in out.splitlines() if line.strip().startswith("- --")]
    flags = dict(word.split("=", 1) for word in args)
    given, model = parse_yaml(recipe.read_text(), where="here")
    assert flags["init_from"] == "/fsx/weights" and flags["model"] == model
    assert all(flags[name] == str(value) for name, value in given.items() if name != "init_from")


def test_2198_conversations_for_scout_warn_of_over_fitting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", f"--config={SCOUT}", "--instance=ml.p4d.24xlarge", "--num_samples=2198"]
    for known in ([], ["--tokens_per_sample=700"]):  # a conversation fills a sequence, however long it is
        assert main([*words, *known]) == 0
        page = capsys.readouterr().out
        assert "200 steps are 5.82 epochs" in page and "not packed" not in page
        assert "5.8 epochs over 2,198 samples: over-fitting is likely beyond 5, which are 171 steps" in page
    assert main([*words, "--tokens_per_sample=700", "--packing=best_fit", "--epochs=6"]) == 0
    assert "46 steps are 5.89 epochs" in capsys.readouterr().out
    # The recipe says what a step is, so hours cut its steps and choose no other step.
    assert main([*words, "--tokens_per_sample=700", "--max_hours=3"]) == 0
    assert "steps fit into 3 h" in capsys.readouterr().out

    rows = (
        {"messages": [{"role": "user", "content": f"Where is {i}?"}, {"role": "assistant", "content": f"At {i}."}]}
        for i in range(2198)
    )
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    words = ["data", "analyze", str(tmp_path / "chats.jsonl"), f"--tokenizer={tokenizer}", "--max_context_width=3072"]
    words += ["--packing=none", "--max_steps=200", "--global_batch_tokens=196608", "--num_gpus=8"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed)
    assert told["datasets"][0]["use"]["epochs"] == pytest.approx(200 * 64 / 2198)
    assert {one["code"] for one in told["warnings"]} >= {"small_set", "epochs"}
    # And the plan of what was analysed says the same.
    (tmp_path / "facts.json").write_text(printed)
    words = ["plan", f"--config={SCOUT}", "--instance=ml.p4d.24xlarge", f"--dataset_facts={tmp_path / 'facts.json'}"]
    assert main(words) == 0
    assert "200 steps are 5.82 epochs" in capsys.readouterr().out


def test_a_recipe_without_data_is_planned_and_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in (*FINE_TUNING, DPO):
        named = [f"--config={recipe}", "--instance=ml.p4d.24xlarge"]
        assert main(["plan", *named]) == 0
        for words in (["sagemaker", *named, *SAGEMAKER], ["slurm", *named, "--dry_run"]):
            with pytest.raises(ConfigError, match=r"found no --dataset, and the embedded corpus is plain text"):
                launch.run(words)
        capsys.readouterr()
        assert main(["train", f"--config={recipe}"]) == 2
        assert "found no --dataset" in capsys.readouterr().err


def test_the_readme_says_where_they_fit() -> None:
    """Each row of its table is the plan's, to the digits that it shows."""
    section = (ROOT / "recipes" / "README.md").read_text().partition("\n## Where they fit\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    files = {"Scout": SCOUT, "Qwen-32B": QWEN}
    assert len(rows) == 2 + 10
    for name, where, memory, hours, dollars in rows[2:]:
        found = re.fullmatch(r"(\d) x (\S+)(?: `(\S+)`)?", where)
        assert found is not None, where
        nodes, instance, flag = found.groups()
        words = [f"--config={files[name]}", f"--instance={instance}", f"--nodes={nodes}", *([flag] if flag else [])]
        made = plan_of_question(question_of(words, wants_price=True))
        gpu, gib = made.memory.gpu, 2**30
        expected = f"{gpu.needed_bytes / gib:.1f} of {gpu.usable_bytes / gib:.1f} GiB: {made.memory.verdict}"
        assert memory.partition(",")[0] == expected
        for shown, value in ((hours, made.hours), (dollars, made.cost.dollars)):
            assert shown == ("" if made.remedy else f"{value:.{len(shown.partition('.')[2])}f}")
