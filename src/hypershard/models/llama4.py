"""Llama 4's text model (Scout): experts beside a shared one in every layer, chunked attention, every fourth layer
without rotary positions and with the whole context, queries and keys normed in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.schema import ModelConfig
from ..log import logger
from .base import ParameterSpec
from .llama import gated_parameters, linear
from .mixtral import MoeFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FULL_ATTENTION_INTERVAL = 4  # transformers' no_rope_layer_interval, the published value


class Llama4(MoeFamily):
    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    acts_on: ClassVar[frozenset[str]] = frozenset(
        {
            "rotary_emb_base",
            "rope_scaling",
            "attention_chunk_size",
            "num_experts",
            "experts_per_token",
            "router_loss_weight",
        }
    )
    published: ClassVar[Mapping[str, Any]] = {
        "rotary_emb_base": 500_000.0,
        "num_experts": 16,
        "experts_per_token": 1,
    }
    router_names: ClassVar[tuple[str, ...]] = (".feed_forward.router.weight",)
    inputs_first_names: ClassVar[tuple[str, ...]] = (".experts.gate_up_proj", ".experts.down_proj")

    def feed_forward_parameters(self, model: ModelConfig, prefix: str) -> list[ParameterSpec]:
        assert model.num_experts and model.experts_per_token and model.intermediate_size
        experts, hidden, inner, std = (
            model.num_experts,
            model.hidden_width,
            model.intermediate_size,
            model.initializer_range,
        )
        share = model.experts_per_token / experts
        prefix += "feed_forward."
        return [
            # [in, out], unlike Mixtral's: transformers multiplies from the left here.
            ParameterSpec(
                prefix + "experts.gate_up_proj", (experts, hidden, 2 * inner), "normal", std, active_share=share
            ),
            ParameterSpec(prefix + "experts.down_proj", (experts, inner, hidden), "normal", std, active_share=share),
            linear(prefix + "router", experts, hidden, std),
            *gated_parameters(model, prefix + "shared_expert."),
        ]

    def attended_tokens(self, model: ModelConfig, *, context_tokens: int) -> list[float]:
        whole = context_tokens / 2
        num_chunks, rest = divmod(context_tokens, model.attention_chunk_size)
        chunked = (num_chunks * model.attention_chunk_size**2 + rest**2) / (2 * context_tokens)
        return [whole if (layer + 1) % _FULL_ATTENTION_INTERVAL == 0 else chunked for layer in range(model.num_layers)]

    def hf_config_class(self) -> Any:
        from transformers import Llama4TextConfig

        return Llama4TextConfig

    def hf_settings(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
            "attention_chunk_size": model.attention_chunk_size,
            "no_rope_layer_interval": _FULL_ATTENTION_INTERVAL,
            "router_aux_loss_coef": model.router_loss_weight,
        }

    def chunk_tokens(self, model: ModelConfig) -> int | None:
        return model.attention_chunk_size if model.attention_chunk_size < model.max_context_width else None

    def build(self, model: ModelConfig, *, path: str = "dense") -> PreTrainedModel:
        chunked = self.chunk_tokens(model) is not None
        if chunked and path == "dense" and not chunks_follow_documents():
            logger.warning(
                f"transformers counts chunks of --attention_chunk_size={model.attention_chunk_size} from the start "
                f"of a row, so with --max_context_width={model.max_context_width} a packed document that crosses a "
                f"border loses sight of its start; version 5.23 counts from each document's start, and so does "
                f"--attention=varlen"
            )
        hf_model = super().build(model, path=path)
        if chunked and path == "varlen":
            from .attention_modules import attend_in_chunks

            for block, kind in zip(hf_model.model.layers, hf_model.config.layer_types, strict=True):
                if kind == "chunked_attention":
                    attend_in_chunks(block.self_attn)
        return hf_model

    def adapt_modules(self, hf_model: PreTrainedModel) -> None:
        from .moe_modules import group_llama4

        group_llama4(hf_model)


def chunks_follow_documents() -> bool:
    """Whether the installed transformers counts attention chunks from each packed document's start (5.23 on)."""
    from transformers import masking_utils

    return hasattr(masking_utils, "remap_positions_for_packed_sequence")
