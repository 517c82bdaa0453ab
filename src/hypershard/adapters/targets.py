"""Which weights get adapters, and what the adapters are: arithmetic on names and shapes, without torch.

Beside `q_proj.weight` [out, in] stand `q_proj.lora_A` [r, in] and `q_proj.lora_B` [out, r]; beside the experts' tensor
`experts.down_proj` stand `experts.down_proj_lora_A` [experts, r, in] and `experts.down_proj_lora_B` [experts, out, r].
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from ..config.schema import AdapterConfig, ModelConfig
from ..errors import ConfigError
from ..models.base import Flops, Matrix, ParameterSpec
from ..models.family import family_of
from .nf4_format import Format

ALL_LINEAR = "all-linear"
# A row of bfloat16 numbers whose bytes are a multiple of 16, as torch's grouped product on GPUs wants it.
_GROUPED_MULTIPLE = 8


@dataclass(frozen=True)
class Target:
    """A weight and the two matrices beside it; A is drawn as PEFT draws it, B is zero, so nothing changes at first."""

    matrix: Matrix
    a: ParameterSpec
    b: ParameterSpec


def scale_of(adapters: AdapterConfig) -> float:
    """What the adapters' product is multiplied by (rank-stabilised: arXiv 2312.03732)."""
    return adapters.lora_alpha / (math.sqrt(adapters.lora_r) if adapters.lora_rslora else adapters.lora_r)


def adapter_targets(model: ModelConfig, adapters: AdapterConfig) -> list[Target]:
    """The weights that --lora_targets names, in the model's order; none without --lora_r.

    Raises ConfigError for a name that means no weight, and for a rank that experts cannot have.
    """
    if not adapters.lora_r:
        return []
    matrices = family_of(model.model_type).matrices(model)
    chosen = [matrix for matrix in matrices if _is_chosen(matrix, _names(adapters, matrices))]
    if adapters.lora_r % _GROUPED_MULTIPLE and any(matrix.num_experts for matrix in chosen):
        dense = sorted({matrix.name.rpartition(".")[2] for matrix in matrices if not matrix.num_experts})
        raise ConfigError(
            f"--lora_r={adapters.lora_r}: experts' products take a multiple of {_GROUPED_MULTIPLE}; give one, or leave "
            f"the experts out, by --lora_targets={','.join(dense)}"
        )
    return [target_of(matrix, adapters.lora_r) for matrix in chosen]


def _names(adapters: AdapterConfig, matrices: list[Matrix]) -> list[str] | None:
    """The ends of names that --lora_targets holds; None for all."""
    names = [name.strip() for name in adapters.lora_targets.split(",")]
    if names == [ALL_LINEAR]:
        return None
    known = sorted({end for matrix in matrices for end in _ends(matrix.name)}, key=lambda end: (end.count("."), end))
    for name in names:
        if name not in known:
            short = [end for end in known if "." not in end]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--lora_targets={adapters.lora_targets}: {name!r} is no matrix of the blocks of this model; expected "
                f"{ALL_LINEAR}, or some of {', '.join(short)}{hint}"
            )
    return names


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_chosen(matrix: Matrix, names: list[str] | None) -> bool:
    return names is None or any(end in names for end in _ends(matrix.name))


def target_of(matrix: Matrix, rank: int) -> Target:
    """What adapters of `rank` beside a weight are."""
    experts = () if matrix.num_experts is None else (matrix.num_experts,)
    prefix = f"{matrix.name}." if matrix.spec.name != matrix.name else f"{matrix.name}_"
    # PEFT's Kaiming draw with a = sqrt(5): evenly between -1/sqrt(in) and 1/sqrt(in). Weight decay acts on both, as it
    # does in Hugging Face's trainer, which leaves out norms and biases only.
    std = 1 / math.sqrt(3 * matrix.width_in)
    share = matrix.spec.active_share
    return Target(
        matrix,
        ParameterSpec(f"{prefix}lora_A", (*experts, rank, matrix.width_in), "uniform", std, active_share=share),
        ParameterSpec(f"{prefix}lora_B", (*experts, matrix.width_out, rank), "zeros", active_share=share),
    )


def nf4_formats(model: ModelConfig, adapters: AdapterConfig) -> dict[str, Format]:
    """The weights that are held in NF4, by name: all matrices of the blocks, with adapters or not; or none."""
    if adapters.bnb_quant_type != "nf4":
        return {}
    matrices = family_of(model.model_type).matrices(model)
    return {matrix.spec.name: Format(matrix.spec.shape, adapters.bnb_double_quant) for matrix in matrices}


def trained_flops(model: ModelConfig, adapters: AdapterConfig, *, context_tokens: int, has_reference: bool) -> Flops:
    """FLOPs of a trained token. Beside frozen weights two thirds of the products: no gradient of theirs is computed.

    A reference that answers are compared with is one more forward.
    """
    whole = family_of(model.model_type).flops_per_token(model, context_tokens=context_tokens)
    specs = adapter_specs(adapter_targets(model, adapters))
    if not specs:
        return whole
    own = sum(6.0 * spec.numel * spec.active_share for spec in specs)
    again = (1 if has_reference else 0) / 3
    return Flops(matmul=whole.matmul * (2 / 3 + again) + own, attention=whole.attention * (1 + again))


def adapter_specs(targets: list[Target]) -> list[ParameterSpec]:
    """What is trained: both matrices of every target."""
    return [spec for target in targets for spec in (target.a, target.b)]
