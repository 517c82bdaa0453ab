"""A little text for the tests of this folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "seven", "grey", "geese", "flew", "over", "some", "house")


def documents(num_documents: int = 120) -> list[str]:
    """Documents of 3 to 60 words, always the same."""
    chance = random.Random(5)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 60))) for _ in range(num_documents)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def names_in(folder: Path) -> list[str]:
    """Names of everything in `folder`, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
