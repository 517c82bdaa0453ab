"""Do the numbers told of a model and its training hold together? Values in, findings out; nothing is run."""

from __future__ import annotations

import dataclasses

from ...catalog.instances import SERVICES, Price, instance
from ...config.schema import ModelConfig
from ...errors import ConfigError
from ...models.family import family_of, parameter_count
from ...units import format_count
from ..scaling import LOSS_BAND_NATS, predicted_loss, tokens_for_loss
from .findings import SAME_COUNT, Claims, Finding, Verdict
from .memory import memory_findings
from .speed import speed_findings

__all__ = ["Claims", "Finding", "Verdict", "check_claims"]

# What makes a model the one it is said to be; the length trained on may be any.
_SHAPE = (
    "model_type",
    "hidden_width",
    "num_layers",
    "num_heads",
    "num_key_value_heads",
    "head_width",
    "intermediate_size",
    "vocab_size",
    "rotary_emb_base",
    "tie_word_embeddings",
    "num_experts",
    "experts_per_token",
)
# Catalog and claim are both rounded to cents.
_SAME_PRICE = 0.005


def check_claims(claims: Claims) -> list[Finding]:
    """Every check that the claims are enough for, the ones that hold too; no finding: nothing could be compared.

    The loss of a model with experts is not checked: the law is of dense models. Raises ConfigError for an unknown
    GPU, instance, service or weight format.
    """
    return [
        *_shape(claims),
        *_count(claims),
        *_loss(claims),
        *speed_findings(claims),
        *memory_findings(claims),
        *_price(claims),
    ]


def _shape(claims: Claims) -> list[Finding]:
    """Whether there can be such a model, and whether it is the one it is said to be."""
    found = []
    if claims.model is not None:
        try:
            family_of(claims.model.model_type).check(claims.model)
        except ConfigError as error:
            text = _text(claims.model)
            found.append(
                Finding(
                    claim="model",
                    verdict=Verdict.IMPOSSIBLE,
                    found=text,
                    expected=f"a shape that {claims.model.model_type} can have",
                    why=str(error),
                )
            )
    if claims.model is not None and claims.published is not None:
        found += _differences(claims.model, claims.published)
    return found


def _differences(model: ModelConfig, published: ModelConfig) -> list[Finding]:
    model, published = (family_of(one.model_type).complete(one) for one in (model, published))
    found = []
    for name in _SHAPE:
        told, real = getattr(model, name), getattr(published, name)
        if told == real:
            continue
        why = "the published configuration has another value"
        if told is not None and real is not None and published.vocab_size is not None:
            changed = dataclasses.replace(published, **{name: told})
            counts = [format_count(parameter_count(one)) for one in (changed, published)]
            if counts[0] != counts[1]:
                why = f"with it the model would have {counts[0]} parameters, and it has {counts[1]}"
        found.append(Finding(claim=name, verdict=Verdict.IMPOSSIBLE, found=f"{told}", expected=f"{real}", why=why))
    return found


def _count(claims: Claims) -> list[Finding]:
    if claims.model is None or claims.model.vocab_size is None or claims.num_parameters is None:
        return []
    count = parameter_count(claims.model)
    same = abs(claims.num_parameters / count - 1) <= SAME_COUNT
    return [
        Finding(
            claim="num_parameters",
            verdict=Verdict.HOLDS if same else Verdict.IMPOSSIBLE,
            found=format_count(claims.num_parameters),
            expected=format_count(count),
            why=f"the parameters of {_text(claims.model)}, counted",
        )
    ]


def _loss(claims: Claims) -> list[Finding]:
    parameters = claims.parameters
    if parameters is None or claims.num_tokens is None or claims.loss_nats is None:
        return []
    if claims.model is not None and family_of(claims.model.model_type).complete(claims.model).num_experts:
        return []
    law = predicted_loss(parameters, claims.num_tokens, num_unique_tokens=claims.num_unique_tokens)
    same = abs(claims.loss_nats - law.loss_nats) <= LOSS_BAND_NATS
    needed = tokens_for_loss(claims.loss_nats, parameters)
    by = "no number of tokens" if needed is None else f"about {format_count(needed)} tokens"
    return [
        Finding(
            claim="loss_nats",
            verdict=Verdict.HOLDS if same else Verdict.DISAGREES,
            found=f"{claims.loss_nats:.2f} after {format_count(claims.num_tokens)} tokens",
            expected=f"{law}",
            why=f"{format_count(parameters)} parameters have that loss after {by}; {law.depends_on}",
        )
    ]


def _price(claims: Claims) -> list[Finding]:
    if claims.instance is None or claims.service is None or claims.dollars_per_hour is None:
        return []
    if claims.service not in SERVICES:
        raise ConfigError(f"service: found {claims.service!r}, expected one of {', '.join(SERVICES)}")
    row = instance(claims.instance)
    prices: dict[str, Price | None] = {service: getattr(row, service) for service in SERVICES}
    listed = prices[claims.service]
    if listed is None:
        return []

    def is_told(price: Price | None) -> bool:
        return price is not None and abs(price.dollars_per_hour / (claims.dollars_per_hour or 0) - 1) <= _SAME_PRICE

    others = [service for service in SERVICES if service != claims.service and is_told(prices[service])]
    why = f"{claims.service} price of the catalog; prices change, and differ by region"
    if others:
        why = f"what is told is the price of {others[0]}; {why}"
    return [
        Finding(
            claim="dollars_per_hour",
            verdict=Verdict.HOLDS if is_told(listed) else Verdict.DISAGREES,
            found=f"${claims.dollars_per_hour:,.2f}/h for {row.name} by {claims.service}",
            expected=f"{listed}",
            why=why,
        )
    ]


def _text(model: ModelConfig) -> str:
    model = family_of(model.model_type).complete(model)
    return (
        f"{model.model_type} {model.hidden_width} wide, {model.num_layers} layers, {model.num_heads} heads, "
        f"{model.intermediate_size} inside, {'tied' if model.tie_word_embeddings else 'untied'}"
    )
