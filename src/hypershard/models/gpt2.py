"""GPT-2: learned positions, LayerNorm, biases everywhere, a plain feed-forward part, dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import Family, ParameterSpec, nearest_divisor, vocab_size_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


class Gpt2(Family):
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    acts_on: ClassVar[frozenset[str]] = frozenset({"resid_pdrop", "embd_pdrop"})
    published: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    # Token table first: when tied it is the head too, and its product counts.
    embedding_names: ClassVar[tuple[str, ...]] = ("transformer.wte.weight", "transformer.wpe.weight")
    inputs_first_names: ClassVar[tuple[str, ...]] = (".weight",)

    def default_intermediate_size(self, model: ModelConfig) -> int:
        return 4 * model.hidden_width

    def check_heads(self, model: ModelConfig) -> None:
        if model.hidden_width % model.num_heads:
            raise ConfigError(
                f"--num_heads={model.num_heads} does not divide --hidden_width={model.hidden_width}, as gpt2 needs; "
                f"the nearest number of heads that does is {nearest_divisor(model.hidden_width, model.num_heads)}"
            )
        if model.head_width != model.hidden_width // model.num_heads:
            raise ConfigError(
                f"--head_width={model.head_width}: gpt2's heads share the width evenly, so it is "
                f"{model.hidden_width // model.num_heads} here; drop the flag"
            )
        if model.num_key_value_heads != model.num_heads:
            raise ConfigError(
                f"--num_key_value_heads={model.num_key_value_heads}: gpt2 has as many as "
                f"--num_heads={model.num_heads}; drop the flag"
            )

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        model = self.complete(model)
        assert model.max_position_embeddings is not None
        std, hidden = model.initializer_range, model.hidden_width
        vocab = (vocab_size_of(model), hidden)
        specs = [
            ParameterSpec("transformer.wte.weight", vocab, "normal", std),
            ParameterSpec("transformer.wpe.weight", (model.max_position_embeddings, hidden), "normal", std),
        ]
        for layer in range(model.num_layers):
            specs += _block_parameters(model, f"transformer.h.{layer}.")
        specs += _norm("transformer.ln_f", hidden)
        if not model.tie_word_embeddings:
            specs.append(ParameterSpec("lm_head.weight", vocab, "normal", std))
        return specs

    def hf_config(self, model: ModelConfig) -> PretrainedConfig:
        from transformers import GPT2Config

        model = self.complete(model)
        return GPT2Config(
            vocab_size=vocab_size_of(model),
            n_positions=model.max_position_embeddings,
            n_embd=model.hidden_width,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=model.intermediate_size,
            activation_function="gelu_new",
            resid_pdrop=model.resid_pdrop,
            embd_pdrop=model.embd_pdrop,
            attn_pdrop=model.attn_pdrop,
            layer_norm_epsilon=model.norm_epsilon,
            initializer_range=model.initializer_range,
            tie_word_embeddings=model.tie_word_embeddings,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )

    def backbone(self, hf_model: PreTrainedModel) -> nn.Module:
        return hf_model.transformer  # type: ignore[no-any-return]

    def blocks(self, hf_model: PreTrainedModel) -> list[nn.Module]:
        return list(hf_model.transformer.h)


def _block_parameters(model: ModelConfig, prefix: str) -> list[ParameterSpec]:
    assert model.intermediate_size is not None
    std, hidden, inner = model.initializer_range, model.hidden_width, model.intermediate_size
    # Two residual branches per layer add up, so their last weights start smaller (GPT-2 paper, section 2.3).
    residual_std = std / math.sqrt(2 * model.num_layers)
    return [
        *_norm(prefix + "ln_1", hidden),
        *_conv1d(prefix + "attn.c_attn", hidden, 3 * hidden, std),
        *_conv1d(prefix + "attn.c_proj", hidden, hidden, residual_std),
        *_norm(prefix + "ln_2", hidden),
        *_conv1d(prefix + "mlp.c_fc", hidden, inner, std),
        *_conv1d(prefix + "mlp.c_proj", inner, hidden, residual_std),
    ]


def _conv1d(name: str, width_in: int, width_out: int, std: float) -> list[ParameterSpec]:
    """transformers' Conv1D: a linear layer whose weight is [in, out], as in the published checkpoints."""
    return [
        ParameterSpec(f"{name}.weight", (width_in, width_out), "normal", std),
        ParameterSpec(f"{name}.bias", (width_out,), "zeros", decay=False),
    ]


def _norm(name: str, width: int) -> list[ParameterSpec]:
    return [
        ParameterSpec(f"{name}.weight", (width,), "ones", decay=False),
        ParameterSpec(f"{name}.bias", (width,), "zeros", decay=False),
    ]
