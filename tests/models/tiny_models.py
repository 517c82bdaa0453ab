"""Small models of every family."""

import dataclasses

from hypershard.config.schema import MODEL_TYPES, ModelConfig
from hypershard.models.family import family_of

_SPECIAL = {
    "llama_v2": {},
    "llama_v3": {"num_key_value_heads": 2, "rope_scaling": "llama3", "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 12},
    "mixtral": {"num_key_value_heads": 2, "num_experts": 4},
    "qwen2": {"num_key_value_heads": 2, "sliding_window": 12},
    "gpt2": {},
    "llama4": {"num_key_value_heads": 2, "num_experts": 4, "attention_chunk_size": 16, "rope_scaling": "llama3"},
}
assert set(_SPECIAL) == set(MODEL_TYPES)


def tiny_model(model_type: str, **changes: object) -> ModelConfig:
    """A completed model of four layers whose every special setting is switched on."""
    model = ModelConfig(
        model_type=model_type, hidden_width=64, num_layers=4, num_heads=4, max_context_width=48, vocab_size=97
    )
    model = dataclasses.replace(model, **{**_SPECIAL[model_type], **changes})
    family = family_of(model_type)
    family.check(model)
    return family.complete(model)
