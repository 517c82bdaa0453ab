"""A config.json read back is the model it was written of."""

import json
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig, Llama4Config

from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.models.files import available_models, model_file
from hypershard.models.from_hf import model_of_folder


@pytest.mark.parametrize("name", available_models())
def test_every_model_file_comes_back(name: str, tmp_path: Path) -> None:
    model = resolve(Layer(name, {"vocab_size": 500} | read_yaml(model_file(name))[0])).config.model
    config = family_of(model.model_type).hf_config(model)
    config.save_pretrained(tmp_path)
    if model.model_type == "llama4":  # as published, inside a model with vision
        Llama4Config(text_config=config.to_dict()).save_pretrained(tmp_path)
    found = model_of_folder(tmp_path, location="somewhere")
    family_of(found.model_type).check(found)
    assert family_of(found.model_type).hf_config(found).to_dict() == config.to_dict()


def test_mixtral_as_published_leaves_out_the_width_of_a_head(tmp_path: Path) -> None:
    """https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json, without what no model depends on."""
    published = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    found = model_of_folder(tmp_path, location="somewhere")
    assert (found.num_layers, found.num_experts, found.head_width, found.rotary_emb_base) == (32, 8, 128, 1e6)


def test_what_no_family_builds_is_refused(tmp_path: Path) -> None:
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"somewhere: its config\.json has model_type gpt_neox"):
        model_of_folder(tmp_path, location="somewhere")
    model = resolve(Layer("tiny", {"vocab_size": 500} | read_yaml(model_file("tiny_llama"))[0])).config.model
    family_of(model.model_type).hf_config(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(ConfigError, match=r"attention_bias True .* such a model is not built here"):
        model_of_folder(tmp_path, location="somewhere")
