"""The same little text in every format the program reads."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from data_texts import documents, write_jsonl
from prepared import prepared

from hypershard.config.schema import DataConfig
from hypershard.data.bins import encoding_pool, prepare
from hypershard.data.bins.prepare import VAL_SHARE
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.tokenizer import TextTokenizer, load_tokenizer

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
        prepared(write_jsonl(folder / "text.jsonl", documents()), dataset, val_share=VAL_SHARE)
    name = "embedded" if request.param == "embedded" else str(dataset)
    return DataConfig(dataset=name, cache_dir=str(folder / "cache"))


@pytest.fixture
def small_batches(monkeypatch) -> None:
    """`prepare` with many batches, many notes in its journal, and processes for the smallest input."""
    monkeypatch.setattr(encoding_pool, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(prepare, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(prepare, "BYTES_PER_PROCESS", 1)


@pytest.fixture
def text_folder(tmp_path) -> Path:
    """220 documents in three files of different formats."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(100))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", documents(90)).read_bytes()))
    (folder / "c.txt").write_text("\n<|endoftext|>\n".join(documents(30)))
    return folder
