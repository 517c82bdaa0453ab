"""The small files of an exported model: configuration, generation settings, tokenizer. As contents, by name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .hf_folder import TOKENIZER_FILES

_TOKENIZER, _SETTINGS, _TOKENS = TOKENIZER_FILES[:3]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin, end and fill a text; None where the tokenizer names none."""

    bos: int | None
    eos: int | None
    pad: int | None


def tokenizer_files(tokenizer: Path, *, eos_token_id: int | None) -> dict[str, bytes]:
    """What transformers reads of the tokenizer (its tokenizer.json, or the folder that holds one).

    A bare tokenizer.json gets the settings that it lacks. Raises CheckpointError when a file cannot be read.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        found = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if tokenizer.is_file():
            found[_TOKENIZER] = tokenizer.read_bytes()
    except OSError as error:
        raise CheckpointError(f"--tokenizer={tokenizer} cannot be read: {error.strerror or error}") from error
    if _SETTINGS not in found:
        settings: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if eos_token_id is not None:
            settings["eos_token"] = _backend(found).id_to_token(eos_token_id)
        found[_SETTINGS] = _json(settings)
    return found


def special_ids(tokenizer: Mapping[str, bytes], *, eos_token_id: int | None) -> SpecialIds:
    """The ids that the tokenizer's own files name. `eos_token_id`, what ended documents in training, goes first."""
    if not tokenizer:
        return SpecialIds(None, eos_token_id, None)
    backend = _backend(tokenizer)
    named: dict[str, Any] = {}
    for name in (_TOKENS, _SETTINGS):
        named |= {key: value for key, value in json.loads(tokenizer.get(name, b"{}")).items() if value is not None}

    def id_of(key: str) -> int | None:
        token = named.get(key)
        text = token.get("content") if isinstance(token, dict) else token  # an AddedToken written out
        return backend.token_to_id(text) if isinstance(text, str) else None

    return SpecialIds(
        id_of("bos_token"), id_of("eos_token") if eos_token_id is None else eos_token_id, id_of("pad_token")
    )


def config_files(hf_config: Any, *, dtype: torch.dtype, ids: SpecialIds) -> dict[str, bytes]:
    """config.json and generation_config.json of a transformers configuration, which is changed in place.

    Without a tokenizer's word an id is None, not the default of the configuration's class, which is of another model.
    """
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    hf_config.dtype = dtype
    hf_config.use_cache = True  # off in training, where nothing is generated
    hf_config.bos_token_id, hf_config.eos_token_id, hf_config.pad_token_id = ids.bos, ids.eos, ids.pad
    with tempfile.TemporaryDirectory(prefix="hypershard-") as folder:
        hf_config.save_pretrained(folder)
        GenerationConfig.from_model_config(hf_config).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _backend(tokenizer: Mapping[str, bytes]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer[_TOKENIZER].decode())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
