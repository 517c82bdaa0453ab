"""Mixtral (arXiv 2401.04088): Mistral with a router and experts in place of the feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import ParameterSpec
from .llama import RopeFamily, linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MoeFamily(RopeFamily):
    """A rope family in which every layer has experts."""

    def check(self, model: ModelConfig) -> None:
        complete = self.complete(model)
        num_experts, chosen = complete.num_experts or 0, complete.experts_per_token or 0
        if chosen > num_experts:
            raise ConfigError(
                f"--experts_per_token={chosen} is more than --num_experts={num_experts}; "
                f"lower the one or raise the other"
            )
        super().check(model)

    def add_router_loss(self, hf_model: PreTrainedModel, *, scale_of_one_sequence: float) -> None:
        from .moe_modules import set_router_loss

        set_router_loss(hf_model, scale_of_one_sequence=scale_of_one_sequence)


class Mixtral(MoeFamily):
    model_types: ClassVar[tuple[str, ...]] = ("mixtral",)
    acts_on: ClassVar[frozenset[str]] = frozenset(
        {"rotary_emb_base", "sliding_window", "num_experts", "experts_per_token", "router_loss_weight"}
    )
    published: ClassVar[Mapping[str, Any]] = {
        "rotary_emb_base": 1_000_000.0,
        "num_experts": 8,
        "experts_per_token": 2,
    }
    router_names: ClassVar[tuple[str, ...]] = (".mlp.gate.weight",)

    def feed_forward_parameters(self, model: ModelConfig, prefix: str) -> list[ParameterSpec]:
        assert model.num_experts and model.experts_per_token and model.intermediate_size
        experts, hidden, inner, std = (
            model.num_experts,
            model.hidden_width,
            model.intermediate_size,
            model.initializer_range,
        )
        share = model.experts_per_token / experts
        return [
            linear(prefix + "mlp.gate", experts, hidden, std),
            ParameterSpec(
                prefix + "mlp.experts.gate_up_proj", (experts, 2 * inner, hidden), "normal", std, active_share=share
            ),
            ParameterSpec(
                prefix + "mlp.experts.down_proj", (experts, hidden, inner), "normal", std, active_share=share
            ),
        ]

    def hf_config_class(self) -> Any:
        from transformers import MixtralConfig

        return MixtralConfig

    def hf_settings(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
            "sliding_window": model.sliding_window,
            # The same number in transformers' own setting, for those who read the exported config.
            "router_aux_loss_coef": model.router_loss_weight,
        }

    def build_options(self) -> dict[str, Any]:
        return {"experts_implementation": "grouped_mm"}

    def adapt_modules(self, hf_model: PreTrainedModel) -> None:
        from .moe_modules import balance_mixtral

        balance_mixtral(hf_model)
