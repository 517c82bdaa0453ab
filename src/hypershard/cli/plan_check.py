"""`hypershard plan --check NAME=VALUE …`: do the numbers told of a model and its training hold together?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..config.flags import coerce
from ..config.schema import ModelConfig
from ..config.sources import Layer, read_yaml, resolve
from ..errors import ConfigError
from ..models.files import model_file
from ..plan.claims.claims import Claims, Verdict, check_claims
from .launch_flags import named_values

_SHAPE = {field.name for field in dataclasses.fields(ModelConfig)}
_FIELDS = {
    field.name: str(field.type) for field in dataclasses.fields(Claims) if field.name not in ("model", "published")
}
HELP = (
    "what is told, to be checked: published=MODEL and its sizes (hidden_width=2432 …), "
    + ", ".join(_FIELDS)
    + "; for example --check num_parameters=1.29e9 num_tokens=6e9 loss_nats=2.37"
)


def run(words: Sequence[str]) -> int:
    """Print every finding; 1 when one of them does not hold. Raises ConfigError for names or values that are none."""
    findings = check_claims(_claims(named_values("--check", words)))
    for finding in findings:
        print(f"{finding.verdict.value:<12} {finding.claim}: found {finding.found}, expected {finding.expected}")
        print(f"{'':12} {finding.why}")
    if not findings:
        print("nothing could be compared: tell more, such as num_parameters with num_tokens and loss_nats")
    return 0 if all(finding.verdict is Verdict.HOLDS for finding in findings) else 1


def _claims(values: dict[str, str]) -> Claims:
    published = _model(values.pop("published")) if "published" in values else None
    unknown = set(values) - _SHAPE - set(_FIELDS)
    if unknown:
        raise ConfigError(
            f"--check {min(unknown)}: expected published, a size of the model, or one of {', '.join(_FIELDS)}"
        )
    told = {name: coerce(name, value, where=f"--check {name}") for name, value in values.items() if name in _SHAPE}
    model = dataclasses.replace(published or ModelConfig(), **told) if told else published
    others = {name: _value(name, value) for name, value in values.items() if name in _FIELDS}
    return Claims(model=model, published=published, **others)  # type: ignore[arg-type]


def _model(name: str) -> ModelConfig:
    path = model_file(name)
    return resolve(Layer(f"model file {Path(path).name}", read_yaml(path)[0])).config.model


def _value(name: str, text: str) -> float | int | str:
    kind = _FIELDS[name]
    if "str" in kind:
        return text
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"--check {name}={text}: expected a number") from None
    return int(number) if kind.startswith("int") else number
