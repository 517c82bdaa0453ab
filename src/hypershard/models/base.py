"""What a model family answers, and what all families share. Imports no torch: planning needs only the arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.schema import ModelConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

# Settings that only some families can act on; `Family.acts_on` says which. A value other than the schema's
# default is refused where it would do nothing.
_FAMILY_SETTINGS = (
    "rotary_emb_base",
    "rope_scaling",
    "sliding_window",
    "attention_chunk_size",
    "num_experts",
    "experts_per_token",
    "router_loss_weight",
    "resid_pdrop",
    "embd_pdrop",
)
_LLAMA3_SCALING_SETTINGS = (
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_context",
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a model: its Hugging Face state-dict name, shape, first value and treatment."""

    name: str
    shape: tuple[int, ...]
    init: str  # "normal" | "uniform" (around 0) | "zeros" | "ones"
    std: float = 0.0  # of "normal" and "uniform"
    decay: bool = True  # False for norms and biases, which weight decay never touches
    active_share: float = 1.0  # share of the tensor one token uses (experts: experts_per_token / num_experts)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Matrix:
    """A weight inside the blocks that activations are multiplied by, or one of each expert in one tensor."""

    spec: ParameterSpec
    inputs_first: bool  # [.., in, out] instead of [.., out, in]

    @property
    def name(self) -> str:
        """What it is called in the model: its module's name, or its own where one module holds several."""
        return self.spec.name.removesuffix(".weight")

    @property
    def num_experts(self) -> int | None:
        return self.spec.shape[0] if len(self.spec.shape) > 2 else None

    @property
    def width_in(self) -> int:
        return self.spec.shape[-2 if self.inputs_first else -1]

    @property
    def width_out(self) -> int:
        return self.spec.shape[-1 if self.inputs_first else -2]


def shard_dimension(shape: Sequence[int], degree: int) -> int:
    """The dimension along which `degree` ranks share a weight.

    Rows, but where experts in one tensor [experts, ...] are fewer than the ranks or do not divide among them: there the
    first other dimension that divides evenly, or most ranks would hold nothing and few of them everything.
    """
    if len(shape) > 2 and shape[0] % degree:
        return next((index for index, size in enumerate(shape) if size % degree == 0), 0)
    return 0


@dataclass(frozen=True)
class Flops:
    """FLOPs per trained token, forward and backward together."""

    matmul: float
    attention: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention


class Family:
    """A model family. Subclasses state facts and override what differs; nothing is registered on import."""

    model_types: ClassVar[tuple[str, ...]] = ()
    acts_on: ClassVar[frozenset[str]] = frozenset()
    # Published values of settings the user left open (all but vocab_size, which the tokenizer decides).
    published: ClassVar[Mapping[str, Any]] = {}
    embedding_names: ClassVar[tuple[str, ...]] = ("model.embed_tokens.weight",)
    # Ends of names: weights that choose experts, and weights kept as [.., in, out].
    router_names: ClassVar[tuple[str, ...]] = ()
    inputs_first_names: ClassVar[tuple[str, ...]] = ()

    # --- configuration

    def complete(self, model: ModelConfig) -> ModelConfig:
        """`model` with every None filled in but vocab_size; a head_width that is no whole number stays for `check`."""
        head_width = model.hidden_width // model.num_heads if model.hidden_width % model.num_heads == 0 else None
        values = {
            "num_key_value_heads": model.num_heads,
            "head_width": head_width,
            "intermediate_size": self.default_intermediate_size(model),
            "max_position_embeddings": model.max_context_width,
            "tie_word_embeddings": False,
            **self.published,
        }
        open_values = {name: value for name, value in values.items() if getattr(model, name) is None}
        return dataclasses.replace(model, **open_values)

    def default_intermediate_size(self, model: ModelConfig) -> int:
        """8/3 of the width, up to the next multiple of 256 (LLaMA, arXiv 2302.13971, with its multiple_of 256)."""
        return math.ceil(8 * model.hidden_width / 3 / 256) * 256

    def check(self, model: ModelConfig) -> None:
        """Refuse what this family cannot be or cannot act on. Raises ConfigError naming the flag."""
        for name in _FAMILY_SETTINGS:
            if name not in self.acts_on and getattr(model, name) != _DEFAULTS[name]:
                raise ConfigError(
                    f"--{name}={getattr(model, name)}: {model.model_type} has nothing this setting could act on; "
                    f"drop the flag or choose another --model_type"
                )
        if model.rope_scaling == "none":
            for name in _LLAMA3_SCALING_SETTINGS:
                if getattr(model, name) != _DEFAULTS[name]:
                    raise ConfigError(
                        f"--{name}={getattr(model, name)} acts only with --rope_scaling=llama3, found none"
                    )
        self.check_heads(self.complete(model))
        longest = model.max_position_embeddings
        if longest is not None and model.max_context_width > longest:
            raise ConfigError(
                f"--max_context_width={model.max_context_width} is longer than the {longest} positions the model is "
                f"made for; lower it or raise --max_position_embeddings"
            )

    def check_heads(self, model: ModelConfig) -> None:
        """Refuse head counts that do not fit the width. `model` is completed."""
        if model.head_width is None:
            raise ConfigError(
                f"--num_heads={model.num_heads} does not divide --hidden_width={model.hidden_width}; "
                f"the nearest number of heads that does is {nearest_divisor(model.hidden_width, model.num_heads)}"
            )
        heads = model.num_key_value_heads or model.num_heads
        if model.num_heads % heads:
            raise ConfigError(
                f"--num_key_value_heads={heads} does not divide --num_heads={model.num_heads}; "
                f"the nearest number that does is {nearest_divisor(model.num_heads, heads)}"
            )

    # --- arithmetic

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        """Every parameter in Hugging Face's order; a tied head is the embedding and is not listed again.

        Raises ConfigError when vocab_size is open.
        """
        raise NotImplementedError

    def matrices(self, model: ModelConfig) -> list[Matrix]:
        """The matrices of the blocks, which adapters can be put beside: no embedding, no output head, no router.

        An open vocab_size does not matter.
        """
        model = dataclasses.replace(model, vocab_size=model.vocab_size or 1)
        others = (*self.embedding_names, "lm_head.weight", *self.router_names)
        return [
            Matrix(spec, inputs_first=spec.name.endswith(self.inputs_first_names))
            for spec in self.parameters(model)
            if len(spec.shape) > 1 and not spec.name.endswith(others)
        ]

    def flops_per_token(self, model: ModelConfig, *, context_tokens: int) -> Flops:
        """FLOPs per trained token of a sequence of `context_tokens`, forward and backward, nothing recomputed.

        matmul: 6 per active parameter that takes part in a matrix product (2 forward, 4 backward; Kaplan et al.,
        arXiv 2001.08361, section 2.1). Lookups (input embedding, position table), norms and biases are no matrix
        products; the output head is one, whether tied or not. attention: QK^T and its product with V cost
        12 x heads x head width x attended tokens per layer, forward and backward (PaLM, arXiv 2204.02311, appendix
        B), with the mean number of tokens attended under the causal mask: half the context, or less under a sliding
        window or chunks. This is Megatron-Bridge's convention; counting the full square instead, as torchtitan
        does, doubles the attention term, so compare utilisation only between numbers of one convention. Packed
        documents attend to less still; like all published numbers this leaves that out.
        """
        model = self.complete(model)
        lookups = self.embedding_names[1:] if model.tie_word_embeddings else self.embedding_names
        matmul = sum(
            spec.numel * spec.active_share
            for spec in self.parameters(model)
            if len(spec.shape) > 1 and spec.name not in lookups
        )
        width = model.num_heads * (model.head_width or 0)
        attended = sum(self.attended_tokens(model, context_tokens=context_tokens))
        return Flops(matmul=6.0 * matmul, attention=12.0 * width * attended)

    def attended_tokens(self, model: ModelConfig, *, context_tokens: int) -> list[float]:
        """For each layer, the mean number of tokens a token attends to in a sequence of `context_tokens`."""
        window = min(model.sliding_window or context_tokens, context_tokens)
        # The first `window` tokens see half of it on average, all later ones the whole.
        return [window * (1 - window / (2 * context_tokens))] * model.num_layers

    def chunk_tokens(self, model: ModelConfig) -> int | None:
        """In how many tokens some layers cut a document for attention; None where they take it whole."""
        return None

    # --- the module

    def hf_config(self, model: ModelConfig) -> PretrainedConfig:
        """The transformers configuration of `model`. Raises ConfigError when vocab_size is open."""
        raise NotImplementedError

    def build(self, model: ModelConfig, *, path: str = "dense") -> PreTrainedModel:
        """The transformers model in float32, its parameters on the meta device and its buffers real, in training mode.

        Ties are real ties. `path` says how documents in one row stay blind to each other. `dense`: torch's SDPA;
        transformers derives a block-diagonal mask from `position_ids` that restart. `varlen`: no mask, attention goes
        from document to document; the backbone is then called with `documents` and `chunks` (attention_modules.py).
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self.hf_config(model)
        config.use_cache = False
        attention = "sdpa"
        if path == "varlen":
            from .attention_modules import register_varlen

            attention = register_varlen()
        with torch.device("meta"):
            hf_model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, **self.build_options()
            )
        self.restore_buffers(hf_model)
        left = [name for name, buffer in hf_model.named_buffers() if buffer.is_meta]
        assert not left, f"buffers without values: {left}"
        self.adapt_modules(hf_model)
        return hf_model.train()

    def build_options(self) -> dict[str, Any]:
        """More arguments of transformers' `from_config`."""
        return {}

    def restore_buffers(self, hf_model: PreTrainedModel) -> None:
        """Give buffers the values their modules compute: on the meta device they have none.

        The rotary embedding is the only module with buffers, and it has no parameters, so it is simply made again.
        """
        backbone: Any = self.backbone(hf_model)
        if hasattr(backbone, "rotary_emb"):
            backbone.rotary_emb = type(backbone.rotary_emb)(config=hf_model.config)

    def adapt_modules(self, hf_model: PreTrainedModel) -> None:
        """Change modules of `hf_model` in place where transformers' own would waste work. Names and values stay."""

    def add_router_loss(self, hf_model: PreTrainedModel, *, scale_of_one_sequence: float) -> None:
        """Add the expert-balance loss to the gradient; call once after `build`. Dense families have none.

        Each sequence adds scale_of_one_sequence x the mean over layers of its balance loss (moe_modules.py), so with
        router_loss_weight / (sequences per optimizer step) the step's gradient is that of router_loss_weight x the
        mean over the step's sequences, however they are spread over ranks and micro-steps. It is an addition to
        whatever gradient the caller's loss brings, and is not multiplied by that loss's own factor.
        """

    def backbone(self, hf_model: PreTrainedModel) -> nn.Module:
        """The module whose forward returns `last_hidden_state`."""
        return hf_model.model  # type: ignore[no-any-return]

    def blocks(self, hf_model: PreTrainedModel) -> list[nn.Module]:
        """The transformer blocks in order."""
        backbone: Any = self.backbone(hf_model)
        return list(backbone.layers)


def vocab_size_of(model: ModelConfig) -> int:
    """The vocabulary's size. Raises ConfigError while it is open."""
    if model.vocab_size is None:
        raise ConfigError("--vocab_size is open: give it, or a --dataset or --tokenizer that decides it")
    return model.vocab_size


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the larger of two."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), -divisor))
