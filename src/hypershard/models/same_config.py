"""Whether a Hugging Face folder describes the model that is to be trained from its weights.

Equal shapes do not make equal models: the number of heads, rotary base, norm epsilon and experts per token change what
the same weights compute and leave no trace in any shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# Keys of a config.json that change what the same weights compute, and that follow from settings.
_SETTABLE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_embd",
    "n_layer",
    "n_head",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "num_local_experts",
    "num_experts_per_tok",
    "attention_chunk_size",
    "tie_word_embeddings",
)
# And those of which every family builds one value, or the one that goes with the others.
_BUILT = (
    "hidden_act",
    "activation_function",
    "attention_bias",
    "mlp_bias",
    "layer_types",
    "no_rope_layers",
    "use_qk_norm",
    "moe_layers",
    "attn_temperature_tuning",
    "floor_scale",
    "attn_scale",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)
_TUNING = "attn_temperature_tuning"


def text_config(directory: Path, *, location: str) -> dict[str, Any]:
    """The config.json in `directory`, a copy of `location`'s; of a model with vision its text model's part.

    Raises ConfigError when transformers cannot read it. None of the folder's code is run.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        content = json.loads((directory / "config.json").read_text())
        text = content.get("text_config", content)
        if isinstance(text.get(_TUNING), int):  # transformers 4.51 wrote its default, a condition, as 4
            text[_TUNING] = bool(text[_TUNING])
            config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        else:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        found: dict[str, Any] = config.get_text_config().to_dict()
        if "head_dim" in found and found["head_dim"] is None:  # of Mixtral, whose file leaves it out
            found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
        return found
    except Exception as error:  # of transformers, huggingface_hub and the file system, which share no base
        raise ConfigError(f"{location}: its config.json cannot be used: {error}") from error


def refuse_other_config(ours: Any, directory: Path, *, init_from: str) -> None:
    """Compare the transformers configuration `ours` with the config.json in `directory`, a copy of `init_from`'s.

    Raises ConfigError naming what differs. A folder without config.json is taken at its weights' word.
    """
    if not (directory / "config.json").is_file():
        return
    theirs = text_config(directory, location=f"--init_from={init_from}")
    mine = ours.to_dict()
    different = [
        name
        for name in (*_SETTABLE, *_BUILT)
        if name in mine and name in theirs and not _same_value(mine[name], theirs[name])
    ]
    if not different:
        return
    shown = "; ".join(f"{name} {theirs[name]} (this run: {mine[name]})" for name in different)
    if any(name in _SETTABLE for name in different):
        hint = "Give --model and the model settings as they stand there"
    else:
        hint = "No setting changes that: such a model is not built here"
    raise ConfigError(f"--init_from={init_from} holds another model: its config.json has {shown}. {hint}")


def _same_value(one: Any, other: Any) -> bool:
    """Equal; numbers to rounding, mappings in the keys that both have (versions of transformers add keys)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_same_value(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other)
    return bool(one == other)
