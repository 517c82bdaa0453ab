"""Flags, files, precedence, provenance, and the errors a user reads."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from hypershard.cli.train import build_parser, resolve_arguments
from hypershard.config import checks
from hypershard.config.flags import add_settings, coerce, parse
from hypershard.config.schema import SETTINGS, Config
from hypershard.config.sources import Layer, read_yaml, resolve, show, to_yaml
from hypershard.errors import ConfigError
from hypershard.models.files import available_models


def resolve_line(line: str) -> tuple[Config, dict[str, str]]:
    resolved, _ = resolve_arguments(parse(build_parser(), line.split(), also_known=("model",)))
    return resolved.config, dict(resolved.sources)


def test_every_setting_is_a_flag_and_survives_yaml(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == set(SETTINGS)
    config, _ = resolve_line("--model tiny_mixtral --lr 3e-4 --max_hours 1.5 --sharding_strategy hybrid")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    values, model = read_yaml(path)
    assert model is None
    assert resolve(Layer("file", values)).config == config


@pytest.mark.parametrize("form", ["--bf16=0", "--bf16 0", "--bf16=false", "--bf16 False", "--bf16 no"])
def test_booleans_in_every_spelling(form: str) -> None:
    assert resolve_line(form)[0].parallel.bf16 is False


def test_precedence_and_provenance(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("model: tiny_llama\nnum_layers: 3\noptim:\n  lr: 0.002\nweight_decay: 0.1\n")
    config, sources = resolve_line(f"--config {run_file} --lr 0.005")
    assert config.optim.lr == 0.005
    assert sources["lr"] == "flag"
    assert config.optim.weight_decay == 0.1
    assert sources["weight_decay"] == f"run file {run_file}"
    assert config.model.num_layers == 3
    assert sources["hidden_width"] in ("model file tiny_llama.yaml", "default")
    assert sources["beta1"] == "default"
    assert sources["rotary_emb_base"].startswith(("family", "model file"))
    shown = show(dataclasses.replace(resolve(Layer("flag", {"lr": "0.005"}, is_flags=True))))
    assert any(line.split() == ["lr", "0.005", "flag"] for line in shown.splitlines())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--hiden_width=3", "unknown flag --hiden_width; did you mean --hidden_width?"),
        ("--gradient_checkpointing=True", "unknown flag --gradient_checkpointing"),
        ("stray", "unexpected word 'stray'"),
        ("--num_layers x", "--num_layers: found 'x', expected a whole number"),
        ("--num_layers 2.5", "expected a whole number"),
        ("--num_layers 0", "expected at least 1"),
        ("--attn_pdrop 2", "between 0.0 and 1.0"),
        ("--sharding_strategy ful", "did you mean full?"),
        ("--lr nan", "expected a number"),
        ("--model lama3_8b", "llama3_8b"),
        ("--hidden_width 2432 --num_layers 18 --num_heads 18 --model_type gpt2", "19"),
        ("--num_heads 4 --num_key_value_heads 3", "num_key_value_heads"),
        ("--max_context_width 512 --max_position_embeddings 256", "max_context_width"),
        ("--model llama2_7b --max_context_width 16384", "longer than the 4096 positions"),
        ("--eval_only 1", "untrained weights"),
        ("--limit_all_gathers 0", "--limit_all_gathers=0"),
        ("--activation_loading_horizon 2", "--activation_loading_horizon"),
        ("--hybrid_shard_degree 2", "--sharding_strategy=hybrid"),
        ("--min_lr 1", "--min_lr=1.0 is above --lr"),
        ("--lr_decay_style wsd", "--plateau"),
        ("--plateau 0.5", "--lr_decay_style"),
        ("--early_stopping_patience 3", "--validation_freq"),
        ("--keep_best 1", "--validation_freq"),
        ("--keep_best 1 --validation_freq 10 --checkpoint_freq 0", "drop --checkpoint_freq=0"),
        ("--early_stopping_min_gain 0.1 --validation_freq 10", "acts only with --early_stopping_patience"),
        ("--global_batch_tokens 1024 --gradient_accumulation_steps 2", "give one of the two"),
        ("--lr_decay_style exponential --min_lr 0", "--min_lr"),
    ],
)
def test_wrong_input_names_what_to_change(line: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=None) as caught:
        resolve_line(line)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_nonsense(name: str) -> None:
    """Every flag that is no free text refuses a word, naming itself."""
    if isinstance(SETTINGS[name][1].default, str) and not SETTINGS[name][1].metadata["choices"]:
        return
    try:
        coerce(name, "banana", where=f"--{name}")
    except ConfigError as error:
        assert str(error).startswith(f"--{name}: found 'banana', expected")
    else:
        assert SETTINGS[name][1].type in ("str", "str | None"), f"--{name}=banana was accepted"


def test_yaml_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, expected in (
        ("num_layer: 3", "did you mean --num_layers"),
        ("- 1", "expected 'name: value' lines"),
        ("lr: [", "not valid YAML"),
        ("lr: 1\noptim: {lr: 2}", "lr stands twice"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert expected in str(caught.value)


def test_values_of_yaml_are_checked_like_flags() -> None:
    with pytest.raises(ConfigError, match="expected a whole number"):
        coerce("num_layers", True, where="file: num_layers")
    assert coerce("max_steps", "1e3", where="--max_steps") == 1000
    assert coerce("max_steps", None, where="x") is None


def test_none_is_a_choice_of_packing_and_not_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("packing: none\n")
    for line in ("--packing none", f"--config {tmp_path / 'run.yaml'}"):
        config, _ = resolve_line(line)
        assert config.data.packing == "none"
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert resolve(Layer("file", read_yaml(tmp_path / "again.yaml")[0])).config == config
    assert resolve_line("--packing null")[0].data.packing is None


@pytest.mark.parametrize("line", ["--data_kind=chat", "--objective=dpo --lora_r=8"])
def test_conversations_must_be_named_to_be_trained_on_not_to_be_planned(line: str) -> None:
    config, _ = resolve_line(line)  # as plans do
    with pytest.raises(ConfigError, match=r"--data_kind=.*found no --dataset.*--channel train=s3://"):
        checks.check_data_is_named(config)
    checks.check_data_is_named(resolve_line(f"{line} --dataset x.jsonl")[0])
    checks.check_data_is_named(resolve_line("")[0])


def test_a_missing_run_file_and_a_wrong_name_for_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config=.*none\.yaml: No such file.*expected a run file"):
        resolve_line(f"--config {tmp_path / 'none.yaml'}")
    with pytest.raises(ConfigError, match="unknown flag --run; did you mean --config"):
        parse(build_parser(), ["--run", "x.yaml"], also_known=("model", "config"))


def test_world_checks() -> None:
    config, _ = resolve_line("--sharding_strategy hybrid --hybrid_shard_degree 3")
    with pytest.raises(ConfigError, match=r"does not divide the 8 ranks.*\[1, 2, 4, 8\]"):
        checks.check_world(config.parallel, world_size=8, local_world_size=8)
    with pytest.raises(ConfigError, match="no multiple of the 2048 tokens"):
        data = dataclasses.replace(config.data, global_batch_tokens=3000, train_batch_size=2)
        checks.accumulation_steps(data, context_tokens=256, world_size=4)
    assert checks.accumulation_steps(config.data, context_tokens=256, world_size=4) == 1
    with pytest.raises(ConfigError, match="smaller than the tokenizer's 4096"):
        model = dataclasses.replace(config.model, vocab_size=100)
        checks.check_vocabulary(model, tokenizer_vocab_size=4096)


@pytest.mark.parametrize("name", available_models())
def test_every_model_file_resolves(name: str) -> None:
    config, sources = resolve_line(f"--model {name}")
    assert config.model.head_width is not None
    assert sources["hidden_width"] in (f"model file {name}.yaml", "default")


def test_resume_flag_without_a_value() -> None:
    assert resolve_line("--resume_from_checkpoint")[0].checkpoint.resume_from_checkpoint == "auto"
    assert resolve_line("--resume_from_checkpoint=/x")[0].checkpoint.resume_from_checkpoint == "/x"
    assert resolve_line("")[0].checkpoint.resume_from_checkpoint is None


@pytest.mark.parametrize(("text", "mode"), [("0", "none"), ("1", "full"), ("full", "full"), ("selective", "selective")])
def test_activation_checkpointing_spellings(text: str, mode: str) -> None:
    assert resolve_line(f"--activation_checkpointing {text}")[0].parallel.activation_checkpointing == mode
