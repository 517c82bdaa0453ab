"""Qwen2 and Qwen2.5 (arXiv 2407.10671), DeepSeek's distillations of them: Llama's shape, biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..config.schema import ModelConfig
from .llama import RopeFamily


class Qwen2(RopeFamily):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    acts_on: ClassVar[frozenset[str]] = frozenset({"rotary_emb_base", "sliding_window"})
    published: ClassVar[Mapping[str, Any]] = {"rotary_emb_base": 1_000_000.0}
    has_qkv_bias: ClassVar[bool] = True

    def hf_config_class(self) -> Any:
        from transformers import Qwen2Config

        return Qwen2Config

    def hf_settings(self, model: ModelConfig) -> dict[str, Any]:
        # transformers windows only layers from max_window_layers on, by default the 28th; ours means every layer.
        return {
            "use_sliding_window": model.sliding_window is not None,
            "sliding_window": model.sliding_window,
            "max_window_layers": 0,
        }
