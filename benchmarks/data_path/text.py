"""Text to measure with: the embedded corpus again and again, other words and another order of lines each time."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hypershard.data.embedded import CORPUS_PATH
from hypershard.data.read.documents import read_documents
from hypershard.data.records import WHOLE, DataFile

# Of ten words one becomes another of the corpus, so that no copy is like the one before to a tokenizer's cache.
_SHARE_OF_NEW_WORDS = 0.1


def write_text(folder: Path, *, size_bytes: int, num_files: int) -> Path:
    """`num_files` JSONL files with about `size_bytes` of documents in all; always the same."""
    chance = random.Random(1)
    file = DataFile(location=str(CORPUS_PATH), size_bytes=CORPUS_PATH.stat().st_size, version="", split=None)
    rows = (json.loads(one.content) for one in read_documents(file, columns=("text",), part=WHOLE, skip=0))
    corpus = [row["text"].split("\n") for row in rows]
    words = [word for lines in corpus for line in lines for word in line.split(" ") if word]
    folder.mkdir()
    files = [(folder / f"part-{number}.jsonl").open("w") for number in range(num_files)]
    written = number = 0
    while written < size_bytes:
        lines = list(corpus[number % len(corpus)])
        chance.shuffle(lines)
        text = "\n".join(_varied(line, words, chance) for line in lines)
        written += files[number % num_files].write(json.dumps({"text": text}) + "\n")
        number += 1
    for one in files:
        one.close()
    return folder


def _varied(line: str, words: list[str], chance: random.Random) -> str:
    return " ".join(chance.choice(words) if chance.random() < _SHARE_OF_NEW_WORDS else word for word in line.split(" "))
