"""The model section that a Hugging Face folder's config.json stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .family import family_of
from .same_config import refuse_other_config, text_config

# transformers' model_type -> ours. Llama 2 and 3 are one there, and told apart by their rotary base.
_TYPES = {
    "llama": "llama_v3",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "llama4_text": "llama4",
}
# Ours -> theirs, of all families but GPT-2; a key that a family's configuration lacks leaves our default.
_KEYS = {
    "hidden_width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "attention_chunk_size": "attention_chunk_size",
    "sliding_window": "sliding_window",
    "router_loss_weight": "router_aux_loss_coef",
}
_GPT2_KEYS = {
    "hidden_width": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
}
_COMMON_KEYS = ("vocab_size", "initializer_range", "tie_word_embeddings")
_SCALING_KEYS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}


def model_of_folder(directory: Path, *, location: str) -> ModelConfig:
    """The model of the config.json in `directory`, a copy of `location`'s, with its longest context.

    What the section says is turned back into a configuration and compared, so nothing is left out unseen. Raises
    ConfigError for a model that no family here builds.
    """
    theirs = text_config(directory, location=location)
    model_type = _TYPES.get(theirs["model_type"])
    if model_type is None:
        raise ConfigError(
            f"{location}: its config.json has model_type {theirs['model_type']}, expected one of {', '.join(_TYPES)}"
        )
    keys = {**(_GPT2_KEYS if model_type == "gpt2" else _KEYS), **{name: name for name in _COMMON_KEYS}}
    values = {ours: theirs[name] for ours, name in keys.items() if theirs.get(name) is not None}
    if theirs.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    rope = _rope(theirs.get("rope_parameters") or {})
    if model_type == "llama_v3" and rope.get("rotary_emb_base") == family_of("llama_v2").published["rotary_emb_base"]:
        model_type = "llama_v2"
    model = ModelConfig(
        model_type=model_type,
        max_context_width=values["max_position_embeddings"],
        **values,
        **rope,
    )
    refuse_other_config(family_of(model_type).hf_config(model), directory, init_from=location)
    return model


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "rope_theta" in parameters:
        found["rotary_emb_base"] = float(parameters["rope_theta"])
    if parameters.get("rope_type") == "llama3":
        scaling = {ours: parameters[name] for ours, name in _SCALING_KEYS.items()}
        found |= {"rope_scaling": "llama3", **scaling}
    return found
