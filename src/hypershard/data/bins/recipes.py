"""Data sets that `hypershard prepare` knows by name: where the text lies, and which tokenizer goes with which models.

Adding one is a row of RECIPES, with its sources.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set and a tokenizer, both readable on the hub without an account."""

    dataset: str
    text_field: str
    tokenizer: str
    about: str
    sources: tuple[str, ...]


# 6 billion tokens sampled from SlimPajama-627B: data/{train,validation,test}-….parquet with the columns text and meta.
_SLIMPAJAMA_6B = "DKYoon/SlimPajama-6B"
_SLIMPAJAMA_SOURCES = (
    "https://huggingface.co/datasets/DKYoon/SlimPajama-6B",
    "https://huggingface.co/datasets/cerebras/SlimPajama-627B",
)

RECIPES = {
    "slimpajama_6b_llama": Recipe(
        dataset=_SLIMPAJAMA_6B,
        text_field="text",
        # The same tokenizer.json as meta-llama/Llama-2-7b-hf, which asks for an account.
        tokenizer="NousResearch/Llama-2-7b-hf",
        about="SlimPajama-6B for Llama 2 (32,000 ids)",
        sources=(*_SLIMPAJAMA_SOURCES, "https://huggingface.co/NousResearch/Llama-2-7b-hf"),
    ),
    "slimpajama_6b_gpt2": Recipe(
        dataset=_SLIMPAJAMA_6B,
        text_field="text",
        tokenizer="openai-community/gpt2",
        about="SlimPajama-6B for GPT-2 (50,257 ids)",
        sources=(*_SLIMPAJAMA_SOURCES, "https://huggingface.co/openai-community/gpt2"),
    ),
}
