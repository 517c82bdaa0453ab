"""Hugging Face model folders with random weights, for tests that start from weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hypershard.models.family import family_of
from tests.jobs import config_of

VOCAB = 4096  # the embedded tokenizer's


def write_hf_folder(folder: Path, flags: str, *, cache_dir: Path) -> None:
    """Save what `transformers` itself makes of the model section these flags give."""
    from transformers import AutoModelForCausalLM

    model = dataclasses.replace(config_of(flags, cache_dir=cache_dir).model, vocab_size=VOCAB)
    torch.manual_seed(0)
    hf_config = family_of(model.model_type).hf_config(model)
    AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(folder)
