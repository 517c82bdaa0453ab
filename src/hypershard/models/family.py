"""Find a family by name; everything about one model type is behind the `Family` it returns."""

from __future__ import annotations

import difflib

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import Family, Flops, ParameterSpec
from .gpt2 import Gpt2
from .llama import LlamaV2, LlamaV3
from .llama4 import Llama4
from .mistral import Mistral
from .mixtral import Mixtral
from .qwen2 import Qwen2

__all__ = ["Family", "Flops", "ParameterSpec", "active_parameter_count", "family_of", "parameter_count"]

FAMILIES: tuple[Family, ...] = (LlamaV2(), LlamaV3(), Mistral(), Mixtral(), Qwen2(), Gpt2(), Llama4())
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family:
    """The family of a model type. Raises ConfigError naming the nearest one for an unknown type."""
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    near = difflib.get_close_matches(model_type, _BY_TYPE, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--model_type={model_type}: expected one of {', '.join(_BY_TYPE)}{hint}")


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the model, a tied head once. Raises ConfigError when vocab_size is open."""
    return sum(spec.numel for spec in family_of(model.model_type).parameters(model))


def active_parameter_count(model: ModelConfig) -> int:
    """Parameters one token uses: all but the experts it is not sent to. Raises ConfigError when vocab_size is open."""
    specs = family_of(model.model_type).parameters(model)
    return round(sum(spec.numel * spec.active_share for spec in specs))
