"""Llama 2 and Llama 3, and the shape that Mistral, Mixtral, Qwen2 and Llama 4 share with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import Family, ParameterSpec, vocab_size_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RopeFamily(Family):
    """Pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated feed-forward part."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rotary_emb_base"})
    has_qkv_bias: ClassVar[bool] = False

    def check_heads(self, model: ModelConfig) -> None:
        super().check_heads(model)
        if (model.head_width or 0) % 2:
            raise ConfigError(
                f"--head_width={model.head_width} is odd (--hidden_width={model.hidden_width}, "
                f"--num_heads={model.num_heads}); rotary positions turn pairs of numbers, so choose an even "
                f"--head_width or another --num_heads"
            )

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        model = self.complete(model)
        std, hidden = model.initializer_range, model.hidden_width
        vocab = (vocab_size_of(model), hidden)
        specs = [ParameterSpec("model.embed_tokens.weight", vocab, "normal", std)]
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}."
            specs += self.attention_parameters(model, prefix + "self_attn.")
            specs += self.feed_forward_parameters(model, prefix)
            specs += [norm(prefix + name, hidden) for name in ("input_layernorm", "post_attention_layernorm")]
        specs.append(norm("model.norm", hidden))
        if not model.tie_word_embeddings:
            specs.append(ParameterSpec("lm_head.weight", vocab, "normal", std))
        return specs

    def attention_parameters(self, model: ModelConfig, prefix: str) -> list[ParameterSpec]:
        """Projections of one layer's attention, [out, in] as torch.nn.Linear keeps them. `model` is completed."""
        assert model.head_width is not None and model.num_key_value_heads is not None
        queries, keys = model.num_heads * model.head_width, model.num_key_value_heads * model.head_width
        specs = []
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            specs.append(linear(prefix + name, width, model.hidden_width, model.initializer_range))
            if self.has_qkv_bias:
                specs.append(ParameterSpec(f"{prefix}{name}.bias", (width,), "zeros", decay=False))
        specs.append(linear(prefix + "o_proj", model.hidden_width, queries, model.initializer_range))
        return specs

    def feed_forward_parameters(self, model: ModelConfig, prefix: str) -> list[ParameterSpec]:
        """The gated feed-forward part of one layer. `model` is completed."""
        return gated_parameters(model, prefix + "mlp.")

    def hf_config(self, model: ModelConfig) -> PretrainedConfig:
        model = self.complete(model)
        return self.hf_config_class()(
            vocab_size=vocab_size_of(model),
            hidden_size=model.hidden_width,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_width,
            max_position_embeddings=model.max_position_embeddings,
            initializer_range=model.initializer_range,
            rms_norm_eps=model.norm_epsilon,
            attention_dropout=model.attn_pdrop,
            tie_word_embeddings=model.tie_word_embeddings,
            rope_parameters=rope_parameters(model),
            use_cache=False,
            # Which ids begin, end and pad a text is the tokenizer's business; exports fill these in.
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **self.hf_settings(model),
        )

    def hf_config_class(self) -> Any:
        """transformers' configuration class."""
        raise NotImplementedError

    def hf_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What this family's configuration class takes besides what all share. `model` is completed."""
        return {}


class LlamaV2(RopeFamily):
    """Llama and Llama 2 (arXiv 2302.13971, 2307.09288)."""

    model_types: ClassVar[tuple[str, ...]] = ("llama_v2",)
    published: ClassVar[Mapping[str, Any]] = {"rotary_emb_base": 10_000.0}

    def hf_config_class(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig


class LlamaV3(LlamaV2):
    """Llama 3, 3.1, 3.2 (arXiv 2407.21783)."""

    model_types: ClassVar[tuple[str, ...]] = ("llama_v3",)
    acts_on: ClassVar[frozenset[str]] = frozenset({"rotary_emb_base", "rope_scaling"})
    published: ClassVar[Mapping[str, Any]] = {"rotary_emb_base": 500_000.0}

    def check(self, model: ModelConfig) -> None:
        if model.rotary_emb_base == 10_000:
            raise ConfigError(
                "--rotary_emb_base=10000 is Llama 2's; Llama 3 uses 500000: drop the flag, or set --model_type=llama_v2"
            )
        sizes = (model.hidden_width, model.num_layers, model.num_heads)
        if sizes == (3072, 28, 24) and model.intermediate_size == 11008:
            raise ConfigError(
                "--intermediate_size=11008 with the other sizes of Llama-3.2-3B makes a 3.94B model; "
                "Llama-3.2-3B has --intermediate_size=8192"
            )
        super().check(model)


def linear(name: str, width_out: int, width_in: int, std: float) -> ParameterSpec:
    """The weight [out, in] of a torch.nn.Linear without bias."""
    return ParameterSpec(f"{name}.weight", (width_out, width_in), "normal", std)


def norm(name: str, width: int) -> ParameterSpec:
    """The gain of an RMSNorm."""
    return ParameterSpec(f"{name}.weight", (width,), "ones", decay=False)


def gated_parameters(model: ModelConfig, prefix: str) -> list[ParameterSpec]:
    """gate, up and down projections of a gated feed-forward part. `model` is completed."""
    assert model.intermediate_size is not None
    hidden, inner, std = model.hidden_width, model.intermediate_size, model.initializer_range
    return [
        linear(prefix + "gate_proj", inner, hidden, std),
        linear(prefix + "up_proj", inner, hidden, std),
        linear(prefix + "down_proj", hidden, inner, std),
    ]


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as transformers describes it. `model` is completed."""
    plain = {"rope_type": "default", "rope_theta": model.rotary_emb_base}
    if model.rope_scaling == "none":
        return plain
    return {
        **plain,
        "rope_type": model.rope_scaling,
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_freq_factor,
        "high_freq_factor": model.rope_high_freq_factor,
        "original_max_position_embeddings": model.rope_original_context,
    }
