"""What a SageMaker job was asked for: hyperparameters and channels to the flags of `hypershard train`.

A hyperparameter is named like a flag, or has one of the spellings below; `train_flags` holds a JSON list of flags word
for word. Values come raw or JSON-encoded, by what submitted the job: `1e-4`, `"run.yaml"` with its quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.flags import nearest_setting
from ..config.schema import SETTINGS
from ..errors import ConfigError

SPELLINGS = {
    "MODEL_ID": "init_from",
    "LEARNING_RATE": "lr",
    "MAX_STEPS": "max_steps",
    "PER_DEVICE_BATCH_SIZE": "train_batch_size",
    "GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "MAX_LENGTH": "max_context_width",
    "LORA_R": "lora_r",
    "LORA_ALPHA": "lora_alpha",
    "LORA_DROPOUT": "lora_dropout",
    "BNB_QUANT_TYPE": "bnb_quant_type",
    "BNB_DOUBLE_QUANT": "bnb_double_quant",
}
"""Hyperparameters as fine-tuning jobs spell them -> our flags."""

CHANNELS = {
    "train": "dataset",
    "training": "dataset",
    "dataset": "dataset",
    "tokenizer": "tokenizer",
    "model": "init_from",
    "config": "config",
}
"""Channel -> the flag that gets its folder. Any other channel is only mounted, for flags to name by its path."""

LAUNCH_FLAGS = ("nproc_per_node", "max_restarts")  # of the supervisor, not of `hypershard train`
_NO_SETTINGS = ("model", "config", *LAUNCH_FLAGS)
_LIST = "train_flags"


def flags_of(hyperparameters: Mapping[str, Any]) -> list[str]:
    """The flags that hyperparameters stand for. Raises ConfigError for an unknown name or one given twice.

    No message holds a value: people put tokens into hyperparameters.
    """
    flags: dict[str, str] = {}
    words: list[str] = []
    for name, value in hyperparameters.items():
        if name.startswith("sagemaker_"):  # added by SageMaker's own SDK for its toolkit, which is not used
            continue
        if name == _LIST:
            words = _word_list(value)
            continue
        flag = SPELLINGS.get(name, name)
        if flag not in SETTINGS and flag not in _NO_SETTINGS:
            meaning = f" stands for --{flag}, which this version does not have" if flag != name else " is unknown"
            raise ConfigError(f"hyperparameter {name}{meaning}{nearest_setting(flag)}")
        if flag in flags:
            raise ConfigError(f"hyperparameter {name}: --{flag} is given twice, by another spelling too; drop one")
        flags[flag] = _text(value)
    return [f"--{flag}={value}" for flag, value in flags.items()] + words


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if value.startswith('"'):
        try:
            value = json.loads(value)
        except ValueError:  # a raw value that begins with a quote
            return value
    return str(value)


def _word_list(value: Any) -> list[str]:
    try:
        words = json.loads(value)
        words = json.loads(words) if isinstance(words, str) else words  # a list that was encoded once more
    except (TypeError, ValueError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f'hyperparameter {_LIST}: expected a JSON list of texts, such as ["--lr=1e-4"]')
    return words


def channel_flags(channels: Mapping[str, Any], *, data: Path) -> list[str]:
    """The flags that name the channels' folders under `data`.

    Raises ConfigError for two channels of one meaning, a channel that is piped, and a `config` channel without exactly
    one YAML file.
    """
    flags: dict[str, Path] = {}
    for channel in sorted(channels):
        if dict(channels[channel] or {}).get("TrainingInputMode") == "Pipe":
            raise ConfigError(f"channel {channel}: found input mode Pipe, expected FastFile or File")
        flag = CHANNELS.get(channel)
        if flag is None:
            continue
        if flag in flags:
            raise ConfigError(f"channel {channel}: another channel is --{flag} already; keep one of them")
        flags[flag] = data / channel
    if "config" in flags:
        flags["config"] = _run_file(flags["config"])
    return [f"--{flag}={path}" for flag, path in flags.items()]


def _run_file(folder: Path) -> Path:
    found = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"channel config: expected one YAML file in {folder}, found {names}")
    return found[0]
