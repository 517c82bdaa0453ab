"""Claims of memory: what weights take in a format, in all and on each GPU, and whether the GPUs can hold them."""

from __future__ import annotations

from ...config.schema import ModelConfig
from ...errors import ConfigError
from ...models.family import active_parameter_count, family_of
from ...units import format_count
from .findings import Claims, Finding, Verdict

# Bits per weight. nf4: 4, and its block scales quantised twice, 0.127 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314,
# section 3); embeddings, the head and norms stay in bf16 with it, as in bitsandbytes.
_BITS = {"fp32": 32.0, "bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.127}
WEIGHT_FORMATS = tuple(_BITS)
# Rounding, and small buffers.
_SAME_BYTES = 0.05


def weight_gb(model: ModelConfig, *, weight_format: str, quantises_experts: bool = True) -> float:
    """10^9 bytes of all weights in `weight_format`.

    Without `quantises_experts` fused experts (3-D weights, which quantisers that look for linear layers pass over) stay
    in bf16. Raises ConfigError when vocab_size is open.
    """
    family = family_of(model.model_type)
    bits = 0.0
    for spec in family.parameters(model):
        is_linear = len(spec.shape) == 2 and spec.name not in family.embedding_names and "lm_head" not in spec.name
        is_quantised = is_linear or (len(spec.shape) == 3 and quantises_experts)
        bits += spec.numel * (_BITS[weight_format] if is_quantised or weight_format != "nf4" else _BITS["bf16"])
    return bits / 8e9


def memory_findings(claims: Claims) -> list[Finding]:
    """Findings on `weights_gb`, `weights_gb_per_gpu`, and on whether these GPUs hold the weights at all."""
    if claims.weight_format is None or claims.parameters is None:
        return []
    if claims.weight_format not in _BITS:
        raise ConfigError(f"weight_format: found {claims.weight_format!r}, expected one of {', '.join(_BITS)}")
    total = _total_gb(claims, claims.weight_format)
    return [*_whole(claims, total), *_per_gpu(claims, total), *_capacity(claims, total), *_experts(claims, total)]


def _total_gb(claims: Claims, weight_format: str) -> float:
    if claims.model is not None and claims.model.vocab_size is not None:
        return weight_gb(claims.model, weight_format=weight_format)
    return (claims.parameters or 0) * _BITS[weight_format] / 8e9


def _whole(claims: Claims, total: float) -> list[Finding]:
    if claims.weights_gb is None:
        return []
    assert claims.weight_format is not None and claims.parameters is not None
    why = f"{format_count(claims.parameters)} parameters in {claims.weight_format}"
    if claims.model is not None and claims.model.vocab_size is not None:
        active = active_parameter_count(claims.model)
        if active < claims.parameters and _same(claims.weights_gb, active * _BITS[claims.weight_format] / 8e9):
            why += f"; what is told is for the {format_count(active)} that one token uses, and all must be in memory"
    return [
        Finding(
            claim="weights_gb",
            verdict=_verdict(claims.weights_gb, total),
            found=f"{claims.weights_gb:,.1f} GB",
            expected=f"{total:,.1f} GB",
            why=why,
        )
    ]


def _per_gpu(claims: Claims, total: float) -> list[Finding]:
    hardware = claims.gpus()
    if claims.weights_gb_per_gpu is None or (hardware is None and claims.num_gpus is None):
        return []
    told = claims.weights_gb_per_gpu
    num_gpus = hardware[1] if hardware else claims.num_gpus or 1
    why = f"{claims.weight_format} weights sharded over {num_gpus} GPUs; {total:,.2f} GB where each GPU has all of them"
    if not _same(told, total / num_gpus):
        fitting = [name for name in WEIGHT_FORMATS if _same(told, _total_gb(claims, name) / num_gpus)]
        if fitting:
            why += f"; what is told fits {' or '.join(fitting)}"
    return [
        Finding(
            claim="weights_gb_per_gpu",
            verdict=_verdict(told, total / num_gpus),
            found=f"{told:,.2f} GB",
            expected=f"{total / num_gpus:,.2f} GB",
            why=why,
        )
    ]


def _capacity(claims: Claims, total: float) -> list[Finding]:
    hardware = claims.gpus()
    if hardware is None:
        return []
    gpu, num_gpus = hardware
    nominal = gpu.memory_gib * 2**30 / 1e9
    holds = total / num_gpus <= nominal
    return [
        Finding(
            claim="num_gpus",
            verdict=Verdict.HOLDS if holds else Verdict.IMPOSSIBLE,
            found=f"{num_gpus} x {gpu.name} of {nominal:,.1f} GB",
            expected=f"{total / num_gpus:,.1f} GB of weights on each, sharded over all",
            why=f"{total:,.1f} GB in {claims.weight_format}; gradients, optimizer and activations come on top",
        )
    ]


def _experts(claims: Claims, total: float) -> list[Finding]:
    """Fused experts in a format that quantisers give to linear layers only."""
    model = claims.model
    if model is None or model.vocab_size is None or claims.weight_format != "nf4":
        return []
    without = weight_gb(model, weight_format="nf4", quantises_experts=False)
    if without == total:
        return []
    return [
        Finding(
            claim="weight_format",
            verdict=Verdict.DISAGREES,
            found="nf4 for all weights",
            expected=f"{without:,.1f} GB instead of {total:,.1f} where experts stay in bf16",
            why="experts are fused 3-D weights, which quantisers of linear layers pass over; name one that does not",
        )
    ]


def _same(told: float, expected: float) -> bool:
    return abs(told / expected - 1) <= _SAME_BYTES


def _verdict(told: float, expected: float) -> Verdict:
    """Less than the bytes there are cannot be; more can."""
    if _same(told, expected):
        return Verdict.HOLDS
    return Verdict.IMPOSSIBLE if told < expected else Verdict.DISAGREES
