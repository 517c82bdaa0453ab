"""Profiles: how a step of a fine-tuning is made up, in one word, or as the user wrote it in a JSON file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.flags import coerce
from ...errors import ConfigError
from ...storage import read_json


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One way to make up a step; the fields are settings of the same names, None: as the flags say.

    `train_batch_size` x `gradient_accumulation_steps` is how many sequences a step takes over all GPUs: on several,
    fewer are accumulated on each.
    """

    name: str
    train_batch_size: int
    gradient_accumulation_steps: int
    max_context_width: int
    num_workers: int | None = None
    activation_checkpointing: str | None = None
    bf16: bool | None = None

    @property
    def samples_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    def settings(self) -> dict[str, Any]:
        """What it sets, by the names of flags."""
        return {name: value for name in _SETTINGS if (value := getattr(self, name)) is not None}


_NEEDED = ("train_batch_size", "gradient_accumulation_steps", "max_context_width")
_SETTINGS = (*_NEEDED, "num_workers", "activation_checkpointing", "bf16")
# 32 sequences a step in each: a usual size for fine-tuning; what differs is how long they are, and how many at a time.
_SHAPES = {"fast": (8, 4, 1024), "balanced": (4, 8, 2048), "quality": (2, 16, 4096), "memory_efficient": (1, 32, 2048)}
PROFILES: dict[str, Profile] = {
    name: Profile(
        name=name,
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_context_width=tokens,
        activation_checkpointing="full" if name == "memory_efficient" else None,
    )
    for name, (batch, accumulation, tokens) in _SHAPES.items()
}


def profile_of(values: Mapping[str, Any], *, where: str) -> Profile:
    """The user's own profile. Raises ConfigError for a key that is none, one that is missing, or a wrong value.

    `fused_optimizer` is accepted as true only: AdamW is always fused here.
    """
    refuse_unknown(values, ("name", "fused_optimizer", *_SETTINGS), where=where)
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; a profile needs {', '.join(_NEEDED)}")
    if values.get("fused_optimizer", True) is not True:
        raise ConfigError(
            f"{where}: found fused_optimizer {values['fused_optimizer']!r}, but AdamW is always fused; drop the key"
        )
    given = {name: values[name] for name in _SETTINGS if values.get(name) is not None}
    coerced = {name: coerce(name, value, where=f"{where}: {name}") for name, value in given.items()}
    return Profile(name=str(values.get("name", "own")), **coerced)


def read_profile(path: Path) -> Profile:
    """The profile in a JSON file. Raises ConfigError as `profile_of`, and for a file that is no JSON object."""
    return profile_of(read_object(path), where=str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: found a {type(content).__name__}, expected an object: {{"name": value, ...}}')
    return content


def refuse_unknown(values: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise ConfigError for the first name that is not `known`, with the nearest that is."""
    known = list(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {name!r}{hint}")
