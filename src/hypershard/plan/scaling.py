"""Scaling laws: the loss that parameters and tokens buy, and how to share a budget of FLOPs between them.

Pure arithmetic on L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3), N parameters
and D tokens, in nats per token. The exponents say how loss falls; the loss itself belongs to the tokenizer, the data
and the schedule that the law was fitted on, so every prediction comes with a band and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.analysis.repetition import worth_in_epochs

# FLOPs per parameter and token, forward and backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); what both
# fits count a budget with.
FLOPS_PER_PARAMETER_TOKEN = 6
# This project's choice for other tokenizers and data of the same kind (English web text); no statistics behind it.
# The runs it was fitted on lie closer: within 0.01 near 1.3B parameters (2.37 after 73B tokens, 2.66 after 6.8B).
LOSS_BAND_NATS = 0.15
DEPENDS_ON = (
    "for training from scratch on web text, one sub-word vocabulary of 32,000 tokens, and a learning rate decayed to "
    "the end; another tokenizer, other data or an early stop move it, fine-tuning is not covered"
)


@dataclass(frozen=True, kw_only=True)
class LossFit:
    """One fit of the law: E `irreducible_nats`, A and a of the parameters, B and b of the tokens."""

    name: str
    irreducible_nats: float
    parameter_scale: float
    parameter_exponent: float
    token_scale: float
    token_exponent: float
    source: str


# The default. Hoffmann's optimizer had stopped early; refitted on the same runs the law agrees with their other two
# methods: about 20 tokens per parameter. Unrounded, as the authors' notebook data_analysis.ipynb prints them.
BESIROGLU = LossFit(
    name="besiroglu",
    irreducible_nats=1.81686,
    parameter_scale=482.006,
    parameter_exponent=0.34781,
    token_scale=2085.434,
    token_exponent=0.36585,
    source="Besiroglu et al. 2024, arXiv:2404.10102",
)
# As printed in the paper. For comparison only: its optimum has 40 to 90 tokens per parameter.
HOFFMANN = LossFit(
    name="hoffmann",
    irreducible_nats=1.69,
    parameter_scale=406.4,
    parameter_exponent=0.34,
    token_scale=410.7,
    token_exponent=0.28,
    source="Hoffmann et al. 2022, arXiv:2203.15556, appendix D.3",
)


@dataclass(frozen=True, kw_only=True)
class PredictedLoss:
    """Loss in nats per token with its band. `effective_tokens`: new tokens that the tokens seen are worth."""

    loss_nats: float
    low_nats: float
    high_nats: float
    effective_tokens: float
    fit: LossFit
    depends_on: str

    def __str__(self) -> str:
        return f"{self.loss_nats:.2f} nats ({self.low_nats:.2f} to {self.high_nats:.2f}; {self.fit.source})"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A budget of `flops` shared between parameters and tokens so that the law's loss is the lowest."""

    flops: float
    num_parameters: float
    num_tokens: float
    loss_nats: float


def loss_nats(num_parameters: float, num_tokens: float, *, fit: LossFit = BESIROGLU) -> float:
    """The law itself: nats per token of a model of `num_parameters` after `num_tokens` new tokens."""
    return (
        fit.irreducible_nats
        + fit.parameter_scale / num_parameters**fit.parameter_exponent
        + fit.token_scale / num_tokens**fit.token_exponent
    )


def predicted_loss(
    num_parameters: float, num_tokens: float, *, num_unique_tokens: float | None = None, fit: LossFit = BESIROGLU
) -> PredictedLoss:
    """Loss after `num_tokens`, of which only `num_unique_tokens` are different ones (None: all are).

    Repeated tokens count for less as in Muennighoff et al. 2023, arXiv:2305.16264 (their decay of the data's worth; not
    their second one, for models larger than the data deserve, so after very many epochs loss is told too low).
    """
    effective = effective_tokens(num_tokens, num_unique_tokens=num_unique_tokens)
    nats = loss_nats(num_parameters, effective, fit=fit)
    return PredictedLoss(
        loss_nats=nats,
        low_nats=nats - LOSS_BAND_NATS,
        high_nats=nats + LOSS_BAND_NATS,
        effective_tokens=effective,
        fit=fit,
        depends_on=DEPENDS_ON,
    )


def effective_tokens(num_tokens: float, *, num_unique_tokens: float | None) -> float:
    """New tokens that `num_tokens` are worth when they repeat `num_unique_tokens`: 4 epochs as 3.7 of new data."""
    if num_unique_tokens is None or num_unique_tokens >= num_tokens:
        return num_tokens
    return num_unique_tokens * worth_in_epochs(num_tokens / num_unique_tokens)


def compute_optimal(flops: float, *, fit: LossFit = BESIROGLU) -> Allocation:
    """Parameters and tokens with the lowest loss for `flops` (6 per parameter and token): Hoffmann's equation 4."""
    a, b = fit.parameter_exponent, fit.token_exponent
    num_parameters = _balance(fit) * (flops / FLOPS_PER_PARAMETER_TOKEN) ** (b / (a + b))
    num_tokens = flops / (FLOPS_PER_PARAMETER_TOKEN * num_parameters)
    return Allocation(
        flops=flops,
        num_parameters=num_parameters,
        num_tokens=num_tokens,
        loss_nats=loss_nats(num_parameters, num_tokens, fit=fit),
    )


def optimal_tokens(num_parameters: float, *, fit: LossFit = BESIROGLU) -> float:
    """Tokens for which a model of `num_parameters` is the best use of its FLOPs; about 20 per parameter.

    A model that will be used much is worth training on far more than that (and most are).
    """
    a, b = fit.parameter_exponent, fit.token_exponent
    return (num_parameters / _balance(fit)) ** ((a + b) / b) / num_parameters


def tokens_for_loss(nats: float, num_parameters: float, *, fit: LossFit = BESIROGLU) -> float | None:
    """New tokens after which a model of `num_parameters` has this loss; None: it never has, however many."""
    left = nats - fit.irreducible_nats - fit.parameter_scale / num_parameters**fit.parameter_exponent
    return (fit.token_scale / left) ** (1 / fit.token_exponent) if left > 0 else None


def _balance(fit: LossFit) -> float:
    """G of Hoffmann's equation 4."""
    a, b = fit.parameter_exponent, fit.token_exponent
    return (a * fit.parameter_scale / (b * fit.token_scale)) ** (1 / (a + b))
