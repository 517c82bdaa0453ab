"""Paths among the flags of training: which of this machine's a job would not find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..log import logger

# Flags of training whose value may be a path.
PATHS = ("dataset", "tokenizer", "chat_template", "init_from", "validation_prompts")


def warn_of_paths(settings: Mapping[str, str], *, seen: Sequence[str], instead: str) -> None:
    """Warn of each path that exists here and lies in none of the folders that the job has `seen`.

    Such a job finds it only where its image holds the same. `instead`: what to do, for people.
    """
    for flag in PATHS:
        value = settings.get(flag)
        if not value or "://" in value or any(Path(value).is_relative_to(folder) for folder in seen):
            continue
        if Path(value).expanduser().exists():
            logger.warning(
                f"--{flag}={value} is a path of this machine; the job finds it only if the image holds it. Else "
                f"{instead}"
            )
