"""The same little text in every format the program reads."""

from __future__ import annotations

import gzip

import pytest
from data_texts import documents, write_jsonl

from hypershard.config.schema import DataConfig
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.prepare import prepare
from hypershard.data.tokenizer import TextTokenizer, load_tokenizer

FORMATS = ("txt", "jsonl", "jsonl_folder", "bins", "embedded")


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(TOKENIZER_PATH)


@pytest.fixture(scope="session", params=FORMATS)
def data_config(request, tmp_path_factory, tokenizer) -> DataConfig:
    """A data section for each format."""
    folder = tmp_path_factory.mktemp(request.param)
    dataset = folder / request.param
    if request.param == "txt":
        dataset = folder / "text.txt"
        dataset.write_text("\n<|endoftext|>\n".join(documents()))
    elif request.param == "jsonl":
        dataset = write_jsonl(folder / "text.jsonl", documents())
    elif request.param == "jsonl_folder":
        dataset.mkdir()
        write_jsonl(dataset / "a.jsonl", documents()[:60])
        (dataset / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "b", documents()[60:]).read_bytes()))
    elif request.param == "bins":
        prepare([write_jsonl(folder / "text.jsonl", documents())], dataset, tokenizer)
    name = "embedded" if request.param == "embedded" else str(dataset)
    return DataConfig(dataset=name, cache_dir=str(folder / "cache"))
