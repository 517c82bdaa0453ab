"""The small files of an exported model: configuration, generation settings, tokenizer. As contents, by name."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..log import logger
from .hf_folder import GENERATION_CONFIG, TOKENIZER_FILES

_TOKENIZER, _SETTINGS, _TOKENS = TOKENIZER_FILES[:3]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_share(value: Any) -> bool:
    return _is_positive(value) and value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What is taken over of a generation_config.json besides ids, and the values it may have.
_GENERATION: dict[str, Callable[[Any], bool]] = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": _is_positive,
    "top_p": _is_share,
    "min_p": _is_share,
    "typical_p": _is_share,
    "repetition_penalty": _is_positive,
    "top_k": _is_count,
    "max_length": _is_count,
    "max_new_tokens": _is_count,
}
_UNTOLD = ("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id")


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


def config_files(hf_config: Any, *, dtype: torch.dtype, ids: SpecialIds, generation: bytes | None) -> dict[str, bytes]:
    """config.json and generation_config.json of a transformers configuration, which is changed in place.

    Without a tokenizer's word an id is None, not the default of the configuration's class, which is of another model.
    `generation`: the generation_config.json of the model that training started from; of it known settings with values
    that can be are taken, and ids that end a text besides ours. CheckpointError: it is no JSON object.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    hf_config.dtype = dtype
    hf_config.use_cache = True  # off in training, where nothing is generated
    hf_config.bos_token_id, hf_config.eos_token_id, hf_config.pad_token_id = ids.bos, ids.eos, ids.pad
    with tempfile.TemporaryDirectory(prefix="hypershard-") as folder:
        hf_config.save_pretrained(folder)
        _save_generation_config(hf_config, generation, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _save_generation_config(hf_config: Any, given: bytes | None, folder: Path) -> None:
    from transformers import GenerationConfig

    ours = GenerationConfig.from_model_config(hf_config)
    if given is None:
        ours.save_pretrained(folder)
        return
    ours._from_model_config = False  # or loading would work it out again
    try:
        theirs = json.loads(given)
    except ValueError as error:
        raise CheckpointError(f"{GENERATION_CONFIG} beside the tokenizer cannot be read: {error}") from error
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{GENERATION_CONFIG} beside the tokenizer: found {type(theirs).__name__}, not an object")
    ends = _ids(theirs.get("eos_token_id"), hf_config.vocab_size)
    own = [] if hf_config.eos_token_id is None else [hf_config.eos_token_id]
    if set(ends) - set(own):  # a chat model ends its turns and texts with several
        ours.eos_token_id = sorted({*ends, *own})
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(ours, name) is None and (found := _ids(theirs.get(name), hf_config.vocab_size)):
            setattr(ours, name, found[0])
    taken = {name: value for name, value in theirs.items() if name in _GENERATION and _GENERATION[name](value)}
    if left := sorted(theirs.keys() - taken.keys() - set(_UNTOLD)):
        logger.warning(f"{GENERATION_CONFIG} of the model it started from: {', '.join(left)} not taken over")
    try:
        GenerationConfig(**{**ours.to_dict(), **taken}).save_pretrained(folder)
    except ValueError as error:  # settings that contradict each other
        logger.warning(f"{GENERATION_CONFIG} of the model it started from: only its ids are taken over: {error}")
        ours.save_pretrained(folder)


def _ids(value: Any, vocab_size: int) -> list[int]:
    """The ids that a setting names, one or several, as far as the model has them."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if _is_count(one) and one < vocab_size]


def _backend(tokenizer: Mapping[str, bytes]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer[_TOKENIZER].decode())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
