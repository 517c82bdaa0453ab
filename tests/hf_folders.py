"""Hugging Face model folders with random weights, for tests that start from weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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


def write_scout_folder(folder: Path, flags: str, *, cache_dir: Path) -> Any:
    """Save a Llama 4 with vision whose text model these flags give; returns transformers' model."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    model = dataclasses.replace(config_of(flags, cache_dir=cache_dir).model, vocab_size=VOCAB)
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    text = family_of(model.model_type).hf_config(model).to_dict()
    wrapper = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).float().eval()
    wrapper.save_pretrained(folder)
    return wrapper
