"""How the plans read their flags: settings as `hypershard train` does, and numbers of their own."""

from __future__ import annotations

import argparse
import dataclasses

from ..catalog.instances import Instance, instance, instances
from ..config.checks import check_vocabulary
from ..config.schema import SETTINGS, Config, ModelConfig
from ..config.sources import Resolved
from ..data.embedded import VOCAB_SIZE
from ..errors import ConfigError
from .train import resolve_arguments


def number(flag: str, text: str, *, minimum: float = 1) -> float:
    """The flag's number. Raises ConfigError for a text that is none, or one below `minimum`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not minimum <= value < float("inf"):
        raise ConfigError(f"--{flag}={text}: expected a number of at least {minimum:g}")
    return value


def whole_number(flag: str, text: str) -> int:
    """The flag's count, at least 1. Raises ConfigError for anything else."""
    value = number(flag, text)
    if value != int(value):
        raise ConfigError(f"--{flag}={text}: expected a whole number of at least 1")
    return int(value)


def resolve(namespace: argparse.Namespace) -> tuple[Resolved, str]:
    """The settings among the flags, as `train` would take them, and the model's name. Raises ConfigError."""
    names = (*SETTINGS, "model", "config")
    return resolve_arguments(
        argparse.Namespace(**{name: value for name, value in vars(namespace).items() if name in names})
    )


def with_vocabulary(config: Config, *, ids_of_data: int | None = None) -> ModelConfig:
    """The model with its vocabulary, which the tokenizer of the data (`ids_of_data`, None: not known) or the embedded
    one decides where nothing else is said.

    Raises ConfigError where only a tokenizer would tell, and for data with more ids than the model's.
    """
    model = config.model
    if ids_of_data is not None:
        check_vocabulary(model, tokenizer_vocab_size=ids_of_data)
        return dataclasses.replace(model, vocab_size=model.vocab_size or ids_of_data)
    if model.vocab_size is not None:
        return model
    if config.data.dataset != "embedded" or config.data.tokenizer is not None:
        raise ConfigError("--vocab_size is open and planning reads no tokenizer: give --vocab_size, its number of ids")
    return dataclasses.replace(model, vocab_size=VOCAB_SIZE)


def instances_of(names: str | None, service: str | None) -> tuple[tuple[Instance, ...], str]:
    """The instances of --instance, or all of the catalog, and whose prices: of ml.… types SageMaker's, else EC2's.

    Raises ConfigError for a type that is none, and for types with and without ml. where --service does not say whose.
    """
    if names is None:
        return instances(), service or "ec2"
    words = [word.strip() for word in names.split(",") if word.strip()]
    rows = tuple(dict.fromkeys(instance(word) for word in words))
    if not rows:
        raise ConfigError(f"--instance={names}: found no type, expected one or more, such as p5,p4d")
    of_sagemaker = {word.startswith("ml.") for word in words}
    if service is None and len(of_sagemaker) > 1:
        raise ConfigError(f"--instance={names}: found types with and without ml.; say whose prices by --service")
    return rows, service or ("sagemaker" if of_sagemaker == {True} else "ec2")
