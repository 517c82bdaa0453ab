"""Weights from and to Hugging Face directories, checked against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from tests.hub_server import HubServer, Repository
from tests.rank_pool import RankPool
from transformers import AutoModelForCausalLM

from hypershard.checkpoint.hf import load_hf_weights
from hypershard.checkpoint.hf_folder import local_copy, model_folder, read_model_folder
from hypershard.config.schema import ModelConfig
from hypershard.data.read.hub import list_model
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


def load(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    load_hf_weights(read_model_folder(str(directory)), tensors)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_hub_gives_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("mixtral")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        server.models["org/model"] = Repository(
            {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        )
        folder = model_folder("org/model", list_model("org/model", cache_dir=tmp_path))
        found = {name: torch.zeros_like(tensor) for name, tensor in parameters(model).items()}
        load_hf_weights(folder, found)
        assert all(torch.equal(found[name], tensor) for name, tensor in parameters(model).items())
        copied = {path.name: path.read_bytes() for path in local_copy(folder, tmp_path / "cache").iterdir()}
        names = ("config.json", "generation_config.json", "tokenizer.json")
        assert copied == {name: (tmp_path / "model" / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_directory_of_save_pretrained_loads(name: str, tmp_path: Path) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = {key: torch.full_like(tensor, 9) for key, tensor in parameters(model).items()}
    load(tmp_path, found)
    for key, tensor in parameters(model).items():
        assert torch.equal(found[key], tensor), key


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
        (
            lambda w: w.update({"vision_model.patch": torch.zeros(1)}),
            r"vision_model\.patch: found in the directory, not in this model",
        ),
        (
            lambda w: w.update({"language_model.model.norm.weight": torch.zeros(32)}),
            r"language_model\.model\.norm\.weight: found in the directory, not in this model",
        ),
        (lambda w: w.clear() or w.update({"x": torch.zeros(1)}), r"and \d+ more\. Give --model"),
    ],
)
def test_other_models_are_refused(change: Callable, message: str, tmp_path: Path) -> None:
    wanted = save_changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, wanted)
    assert all(not tensor.any() for tensor in wanted.values()), "nothing is loaded from a refused directory"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",  # Llama 4 with vision
        lambda name: name.removeprefix("model."),  # the model without its head
    ],
)
def test_other_spellings_of_names_are_understood(rename: Callable[[str], str], tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in weights.items()}
        weights.clear()
        weights.update(renamed)
        if "language_model.model.norm.weight" in weights:
            weights["vision_model.patch"] = torch.zeros(2)
        weights["h.0.attn.masked_bias"] = torch.zeros(2)

    wanted = save_changed(tmp_path, change)
    load(tmp_path, wanted)
    expected = parameters(build("llama")[0])
    assert all(torch.equal(wanted[name], expected[name]) for name in expected)


def test_values_are_cast_to_the_tensors_dtype(tmp_path: Path) -> None:
    wanted = save_changed(tmp_path, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    load(tmp_path, wanted)
    norm = parameters(build("llama")[0])["model.norm.weight"]
    assert wanted["model.norm.weight"].dtype == torch.float32
    assert torch.equal(wanted["model.norm.weight"], norm.bfloat16().float())


def test_missing_damaged_and_pickled_files_are_named(tmp_path: Path) -> None:
    wanted = {"model.norm.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"--init_from=.*: found no such folder, or an empty one, expected model\.safetensors"
    ):
        load(tmp_path, wanted)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load(tmp_path, wanted)
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .* the file was cut off"):
        load(tmp_path, wanted)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path, wanted)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names gone\.safetensors, not found beside it"):
        load(tmp_path, wanted)
