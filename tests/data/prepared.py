"""Token bins made from files in one call, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hypershard.data.bins.meta import BinsMeta
from hypershard.data.bins.prepare import prepare
from hypershard.data.bins.token_bins import TokenBins
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.encoder import EncoderSpec, encoder_spec
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.read.files import find_files
from hypershard.data.records import DataFile

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def spec_of(text_field: str = "text", chat_template: Path | None = None) -> EncoderSpec:
    """The embedded tokenizer; conversations where a template is given."""
    return encoder_spec(
        kind="text" if chat_template is None else "chat",
        tokenizer=load_tokenizer(TOKENIZER_PATH),
        text_field=text_field,
        messages_field="messages",
        chat_template=chat_template,
    )


def listed(path: Path) -> list[DataFile]:
    return find_files(str(path), dataset_config_name=None, cache_dir=path.parent / "hub")


def prepared(path: Path, output: Path, *, spec: EncoderSpec | None = None, **options) -> BinsMeta:
    """Token bins of the file or folder `path`, with quiet defaults."""
    options = {"val_share": 0.1, "seed": 0, "malformed_rows": "refuse", "num_processes": 1} | options
    return prepare(listed(path), output, spec or spec_of(), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(source: TokenBins) -> list[str]:
    """The documents of a split, cut where `document_starts` says."""
    tokenizer = load_tokenizer(TOKENIZER_PATH)
    tokens = source.read(0, source.num_tokens)
    return [tokenizer.backend.decode(part.tolist()) for part in np.split(tokens, source.document_starts[1:])]
