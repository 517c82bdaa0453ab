"""What is claimed of a model and its training, and what was found about it: the words of claims.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum

from ...catalog.gpus import Gpu, gpus
from ...catalog.instances import instance
from ...config.schema import ModelConfig
from ...errors import ConfigError
from ...models.family import family_of, parameter_count
from ..scaling import FLOPS_PER_PARAMETER_TOKEN

# Published counts are rounded to three figures and leave out or count in small parts (positions, a vision tower).
SAME_COUNT = 0.01


class Verdict(StrEnum):
    """`DISAGREES`: with an empirical law outside its band, with rates that runs have, or with a list of prices; there
    may be a reason. `IMPOSSIBLE`: by arithmetic, or because the model it is said to be is published with another shape.
    """

    HOLDS = "holds"
    DISAGREES = "disagrees"
    IMPOSSIBLE = "cannot be true"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was `found` for a claim (the name of its field in Claims), what was `expected`, and why."""

    claim: str
    verdict: Verdict
    found: str
    expected: str
    why: str

    def __str__(self) -> str:
        return f"{self.claim} {self.verdict}: found {self.found}, expected {self.expected} ({self.why})"


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What is said of a model, its data, its speed, its memory and its price; None: nothing is said.

    `model` is the shape as claimed, `published` that of the model it is said to be. `tokens_per_second` is over all
    GPUs, `mfu` a share of the bf16 peak (0.4, not 40), `hours` the whole training's. GPUs are `num_gpus` of `gpu` (a
    name of the catalog), or those of one `instance`. `weights_gb` (10^9 bytes) is what all weights take in
    `weight_format`, `weights_gb_per_gpu` each GPU's part of them. `dollars_per_hour` is for one instance from
    `service` ("ec2", "sagemaker").
    """

    model: ModelConfig | None = None
    published: ModelConfig | None = None
    num_parameters: float | None = None
    num_tokens: float | None = None
    num_unique_tokens: float | None = None
    loss_nats: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hours: float | None = None
    gpu: str | None = None
    num_gpus: int | None = None
    weight_format: str | None = None
    weights_gb: float | None = None
    weights_gb_per_gpu: float | None = None
    instance: str | None = None
    service: str | None = None
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{field.name}: found {value}, expected a number above 0")

    @property
    def parameters(self) -> float | None:
        """Of the shape, where it is told, else as claimed."""
        if self.model is not None and self.model.vocab_size is not None:
            return parameter_count(self.model)
        return self.num_parameters

    def gpus(self) -> tuple[Gpu, int] | None:
        """The GPUs and how many of them; None where either is not told. Raises ConfigError for unknown names."""
        if self.gpu is not None:
            known = {gpu.name: gpu for gpu in gpus()}
            if self.gpu not in known:
                raise ConfigError(f"gpu: found {self.gpu!r}, expected one of {', '.join(known)}")
            return None if self.num_gpus is None else (known[self.gpu], self.num_gpus)
        if self.instance is None:
            return None
        row = instance(self.instance)
        return row.gpu, self.num_gpus or row.num_gpus

    def flops_per_token(self) -> tuple[float, float] | None:
        """FLOPs per trained token by the lowest and the highest convention in use, forward and backward.

        Where the shape is told: matrix products alone, and with attention over the full square; else 6 per parameter.
        All weights train and nothing is computed twice: adapters alone need two thirds, recomputation adds a third.
        """
        if self.model is not None and self.model.vocab_size is not None:
            flops = family_of(self.model.model_type).flops_per_token(
                self.model, context_tokens=self.model.max_context_width
            )
            return flops.matmul, flops.matmul + 2 * flops.attention
        if self.num_parameters is None:
            return None
        return (FLOPS_PER_PARAMETER_TOKEN * self.num_parameters,) * 2
