"""Weights from and to Hugging Face directories, checked against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.rank_pool import RankPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.hf import Export, export_hf, load_hf_weights
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place, StoredCheckpoint
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.config.schema import ModelConfig
from hypershard.errors import CheckpointError
from hypershard.models.family import family_of

SMALL: dict[str, Any] = {
    "hidden_width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 61,
    "max_context_width": 32,
    "intermediate_size": 48,
}
MODELS = {
    "llama": ModelConfig(model_type="llama_v3", num_key_value_heads=2, **SMALL),
    "llama_tied": ModelConfig(model_type="llama_v3", tie_word_embeddings=True, **SMALL),
    "gpt2_tied": ModelConfig(model_type="gpt2", **SMALL),
    "qwen2": ModelConfig(model_type="qwen2", **SMALL),
    "mixtral": ModelConfig(model_type="mixtral", num_experts=4, experts_per_token=2, **SMALL),
    "llama4": ModelConfig(model_type="llama4", num_experts=4, experts_per_token=1, **SMALL),
}


def build(name: str) -> tuple[Any, Any]:
    """(transformers model with random weights, its configuration)."""
    family = family_of(MODELS[name].model_type)
    hf_config = family.hf_config(family.complete(MODELS[name]))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model, hf_config


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def checkpoint_of(model: Any, directory: Path) -> StoredCheckpoint:
    tensors = {f"model/{name}": tensor for name, tensor in parameters(model).items()}
    tensors |= {f"optimizer/exp_avg/{name}": torch.ones_like(tensor) for name, tensor in parameters(model).items()}
    tier = DurableTier(Place(DiskStore(directory)))
    tier.save(1, take_snapshot(tensors), {}, Lineage(1, "first"))
    return tier.place.finished()[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10), use_cache=False).logits.float()


@pytest.mark.parametrize("name", MODELS)
def test_directory_of_save_pretrained_loads(name: str, tmp_path: Path) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = {key: torch.full_like(tensor, 9) for key, tensor in parameters(model).items()}
    load_hf_weights(tmp_path, found)
    for key, tensor in parameters(model).items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_export_has_the_same_logits(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model, hf_config = build(name)
    output = tmp_path / "out"
    export = Export(torch.float32, max_shard_bytes=max_shard_bytes)
    export_hf(checkpoint_of(model, tmp_path / "run"), output, hf_config, export=export)
    assert (output / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    loaded, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_export_names_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    model, hf_config = build(name)
    model.save_pretrained(tmp_path / "theirs")
    export_hf(checkpoint_of(model, tmp_path), tmp_path / "ours", hf_config, export=Export(torch.float32))
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_export_in_bfloat16_with_tokenizer(tmp_path: Path) -> None:
    model, hf_config = build("llama")
    tokenizer = tmp_path / "tokenizer.json"
    write_tokenizer(tokenizer)
    export_hf(
        checkpoint_of(model, tmp_path),
        tmp_path / "out",
        hf_config,
        export=Export(tokenizer_path=tokenizer, eos_token_id=1),
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.eos_token_id == 1 == loaded.generation_config.eos_token_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a b")["input_ids"] == [2, 3] and read.eos_token == "<eos>"


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))


def test_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hf_config = build("llama")
    checkpoint = checkpoint_of(model, tmp_path / "run")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hypershard.checkpoint.hf._write_config", killed)
        with pytest.raises(KeyboardInterrupt):
            export_hf(checkpoint, tmp_path / "out", hf_config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("")
    export_hf(checkpoint, tmp_path / "out", hf_config)
    assert not (tmp_path / "out" / "old").exists()


def test_export_refuses_damage_and_a_full_directory(tmp_path: Path) -> None:
    model, hf_config = build("llama")
    checkpoint = checkpoint_of(model, tmp_path / "run")
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(checkpoint, tmp_path / "run", hf_config)
    data = Path(checkpoint.location) / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="found checksum"):
        export_hf(checkpoint, tmp_path / "out", hf_config)
    assert not (tmp_path / "out").exists()


def test_each_rank_reads_its_own_rows(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    model, _ = build("mixtral")
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters(model).items()}
    for found in pools(3).run(ranks.hf_rows, tmp_path, shapes):
        assert all(torch.equal(found[name], tensor) for name, tensor in parameters(model).items())


def save_changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, torch.Tensor]:
    model, _ = build("llama")
    weights = {name: tensor.clone() for name, tensor in parameters(model).items()}
    wanted = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"model\.norm\.weight: found nothing, expected \(32,\)"),
        (lambda w: w.pop("lm_head.weight"), r"lm_head\.weight: found nothing.*--tie_word_embeddings 1"),
        (
            lambda w: w.update({"model.other": torch.zeros(1)}),
            r"model\.other: found in the directory, not in this model",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
            r"model\.norm\.weight: found \(31,\), expected \(32,\)",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.uint8)}), r"found U8 \(quantised\)"),
        (lambda w: w.clear() or w.update({"x": torch.zeros(1)}), r"and \d+ more\. Give --model"),
    ],
)
def test_other_models_are_refused(change: Callable, message: str, tmp_path: Path) -> None:
    wanted = save_changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_hf_weights(tmp_path, wanted)
    assert all(not tensor.any() for tensor in wanted.values()), "nothing is loaded from a refused directory"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",  # Llama-4 with vision
        lambda name: name.removeprefix("model."),  # the model without its head
    ],
)
def test_other_spellings_of_names_are_understood(rename: Callable[[str], str], tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        weights.clear()
        weights.update(renamed)
        weights["vision_model.patch"] = torch.zeros(2)
        weights["h.0.attn.masked_bias"] = torch.zeros(2)

    wanted = save_changed(tmp_path, change)
    load_hf_weights(tmp_path, wanted)
    expected = parameters(build("llama")[0])
    assert all(torch.equal(wanted[name], expected[name]) for name in expected)


def test_values_are_cast_to_the_tensors_dtype(tmp_path: Path) -> None:
    wanted = save_changed(tmp_path, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    load_hf_weights(tmp_path, wanted)
    norm = parameters(build("llama")[0])["model.norm.weight"]
    assert wanted["model.norm.weight"].dtype == torch.float32
    assert torch.equal(wanted["model.norm.weight"], norm.bfloat16().float())


def test_missing_damaged_and_pickled_files_are_named(tmp_path: Path) -> None:
    wanted = {"model.norm.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"--init_from=.*found no weights, expected model\.safetensors"):
        load_hf_weights(tmp_path, wanted)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load_hf_weights(tmp_path, wanted)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_hf_weights(tmp_path, wanted)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names gone\.safetensors, not found beside it"):
        load_hf_weights(tmp_path, wanted)
