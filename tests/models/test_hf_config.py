"""What transformers is told, against the published config.json files and setting by setting."""

import dataclasses
from typing import Any

import pytest
from tiny_models import tiny_model

from hypershard.config.schema import MODEL_TYPES
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.models.files import model_file

LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02, "attention_dropout": 0.0}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# From the config.json of each model, in transformers 5's spelling (rope_theta and rope_scaling in one).
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        **LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "rope_parameters": plain(10000.0),
        "attention_bias": False,
        "mlp_bias": False,
    },
    "llama3_1_8b": {
        **LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_parameters": {**LLAMA3_SCALING, "factor": 8.0},
    },
    "llama3_2_1b": {
        **LLAMA,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3_SCALING, "factor": 32.0},
    },
    "mathstral_7b": {
        **LLAMA,
        "model_type": "mistral",
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "vocab_size": 32768,
        "rope_parameters": plain(1000000.0),
    },
    "mixtral_8x7b": {
        **LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rope_parameters": plain(1000000.0),
    },
    "deepseek_r1_distill_qwen_32b": {
        **LLAMA,
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "use_sliding_window": False,
        "max_position_embeddings": 131072,
        "vocab_size": 152064,
        "rope_parameters": plain(1000000.0),
    },
    "llama4_scout_17b_16e": {
        **LLAMA,
        "model_type": "llama4_text",
        "head_dim": 128,
        "intermediate_size": 8192,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10485760,
        "no_rope_layers": [1, 1, 1, 0] * 12,
        "rope_parameters": {**LLAMA3_SCALING, "factor": 16.0, "high_freq_factor": 1.0},
    },
    "gpt2_1_36b": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": 2048,
        "vocab_size": 50257,
        "scale_attn_weights": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_get_their_published_configuration(name: str) -> None:
    model = resolve(Layer(name, read_yaml(model_file(name))[0])).config.model
    config = family_of(model.model_type).hf_config(model)
    for key, value in PUBLISHED[name].items():
        assert getattr(config, key) == value, key


CHANGES = {
    "hidden_width": 128,
    "num_layers": 5,
    "num_heads": 8,
    "num_key_value_heads": 1,
    "head_width": 32,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "vocab_size": 98,
    "rotary_emb_base": 777.0,
    "rope_scaling_factor": 5.0,
    "rope_low_freq_factor": 1.5,
    "rope_high_freq_factor": 5.0,
    "rope_original_context": 24,
    "tie_word_embeddings": None,  # the other one
    "sliding_window": 7,
    "attention_chunk_size": 7,
    "num_experts": 6,
    "experts_per_token": 3,
    "router_loss_weight": 0.7,
    "norm_epsilon": 1e-3,
    "initializer_range": 0.5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.3,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_setting_that_is_accepted_arrives(model_type: str, name: str) -> None:
    """No setting is taken and then dropped: what `check` lets pass changes what transformers is told."""
    model, family = tiny_model(model_type), family_of(model_type)
    value = not model.tie_word_embeddings if name == "tie_word_embeddings" else CHANGES[name]
    changed = dataclasses.replace(model, **{name: value})
    if model_type == "gpt2" and name in ("hidden_width", "num_heads", "num_key_value_heads", "head_width"):
        # These move together only.
        changed = dataclasses.replace(model, hidden_width=128, num_heads=2, num_key_value_heads=2, head_width=64)
    acting = name in family.acts_on or not name.startswith(
        ("rotary", "rope", "sliding", "attention_chunk", "num_experts", "experts", "router", "resid", "embd")
    )
    if name.startswith("rope_"):
        acting = model.rope_scaling == "llama3"
    if acting:
        family.check(changed)
        assert family.hf_config(changed).to_dict() != family.hf_config(model).to_dict()
    else:
        with pytest.raises(ConfigError, match=f"--{name}"):
            family.check(changed)
