"""A small English and technical text corpus with its tokenizer: training that needs no network and no files.

What it is, its licence and how it was made: README.md in this folder. `build.py` makes it again.
"""

from __future__ import annotations

from pathlib import Path

CORPUS_PATH = Path(__file__).parent / "corpus.jsonl.xz"
TOKENIZER_PATH = Path(__file__).parent / "tokenizer.json"
EOS_TOKEN = "<|endoftext|>"
VOCAB_SIZE = 4096
