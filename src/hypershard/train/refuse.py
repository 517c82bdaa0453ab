"""What would train on in silence and be wrong: refused before the first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..config.schema import Config
from ..data.encode.tokenizer import same_vocabulary
from ..data.open import Dataset
from ..distributed.collectives import gather_objects
from ..errors import ConfigError
from .init_from import Origin


def refuse_unequal_ranks(config: Config, dataset: Dataset) -> None:
    """Ranks that read other data, or were started with other flags, would train on in silence.

    Raises ConfigError on every rank, naming the first rank that differs from rank 0 and in what.
    """
    own: dict[str, Any] = {"train data": dataset.fingerprint, "validation data": dataset.val_fingerprint}
    for section, values in dataclasses.asdict(config).items():
        own |= values if section != "report" else {}
    everyone = gather_objects(own)
    for rank, other in enumerate(everyone):
        main = everyone[0]
        different = [f"{name} {other[name]} (rank 0: {main[name]})" for name in own if other[name] != main[name]]
        if different:
            raise ConfigError(
                f"rank {rank} differs from rank 0: {'; '.join(different)}. Start every rank with the same flags, and "
                f"give every node the same files"
            )


def refuse_other_tokenizer(config: Config, dataset: Dataset, origin: Origin | None) -> None:
    """Raises ConfigError when the model folder's tokenizer is not the data's: the ids would mean other tokens."""
    models_own = origin.tokenizer if origin else None
    if models_own is None or dataset.tokenizer_path is None:
        return
    if not same_vocabulary(models_own, dataset.tokenizer_path):
        raise ConfigError(
            f"--init_from={config.train.init_from} has a tokenizer of its own, and the data were tokenised with "
            f"another ({dataset.tokenizer_path}); drop --tokenizer, or prepare the token bins with the model's own "
            f"({models_own})"
        )


def refuse_other_kind(config: Config, dataset: Dataset) -> None:
    """Raises ConfigError where preferences are to be learnt from other data, or other things from pairs of answers."""
    if dataset.is_preference and config.learning.objective != "dpo":
        raise ConfigError(
            f"--dataset={config.data.dataset} holds preferences, pairs of a chosen and a rejected answer; give "
            f"--objective=dpo to learn them"
        )
    if config.learning.objective == "dpo" and not dataset.is_preference:
        raise ConfigError(
            f"--objective=dpo learns from rows with `chosen` and `rejected`, and --dataset={config.data.dataset} "
            f"holds none; give another --dataset"
        )


def refuse_missing_bf16(config: Config, device: torch.device) -> None:
    """Raises ConfigError for bfloat16 on a GPU that only emulates it."""
    if config.parallel.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"--bf16=1: {torch.cuda.get_device_name(device)} computes no bfloat16, as GPUs do from the "
            f"A100 and A10G on; set --bf16=0"
        )
