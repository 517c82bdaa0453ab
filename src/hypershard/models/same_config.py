"""Whether a Hugging Face folder describes the model that is to be trained from its weights.

Equal shapes do not make equal models: the number of heads, rotary base, norm epsilon and experts per token change what
the same weights compute and leave no trace in any shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# Keys of a config.json that change what the same weights compute.
_MEANING = (
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
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "num_local_experts",
    "num_experts_per_tok",
    "attention_chunk_size",
    "no_rope_layers",
    "use_qk_norm",
    "tie_word_embeddings",
)


def refuse_other_config(ours: Any, directory: Path, *, init_from: str) -> None:
    """Compare the transformers configuration `ours` with the config.json in `directory`, a copy of `init_from`'s.

    Raises ConfigError naming what differs. A folder without config.json is taken at its weights' word.
    """
    if not (directory / "config.json").is_file():
        return
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--init_from={init_from}: its config.json cannot be used: {error}") from error
    mine = ours.to_dict()
    different = [
        f"{name} {theirs[name]} (this run: {mine[name]})"
        for name in _MEANING
        if name in mine and name in theirs and not _same_value(mine[name], theirs[name])
    ]
    if different:
        raise ConfigError(
            f"--init_from={init_from} holds another model: its config.json has {'; '.join(different)}. "
            f"Give --model and the model settings as they stand there"
        )


def _same_value(one: Any, other: Any) -> bool:
    """Equal; numbers to rounding, mappings in the keys that both have (versions of transformers add keys)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_same_value(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other)
    return bool(one == other)
