"""Mistral 7B and its kin (arXiv 2310.06825): Llama's shape with an optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..config.schema import ModelConfig
from .llama import RopeFamily


class Mistral(RopeFamily):
    model_types: ClassVar[tuple[str, ...]] = ("mistral",)
    acts_on: ClassVar[frozenset[str]] = frozenset({"rotary_emb_base", "sliding_window"})
    published: ClassVar[Mapping[str, Any]] = {"rotary_emb_base": 1_000_000.0}

    def hf_config_class(self) -> Any:
        from transformers import MistralConfig

        return MistralConfig

    def hf_settings(self, model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": model.sliding_window}  # transformers' default is 4096, ours none
