from __future__ import annotations

import os

import pytest
from data_texts import documents, names_in, write_jsonl

from hypershard.data import text as text_file
from hypershard.data.text import prepare_text
from hypershard.data.token_bins import open_token_bins
from hypershard.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", documents())


def cached(corpus, tmp_path, tokenizer, text_field="text"):
    return prepare_text([corpus], tmp_path / "cache", tokenizer, text_field=text_field)


def test_text_is_tokenised_once(corpus, tmp_path, tokenizer, monkeypatch):
    folder = cached(corpus, tmp_path, tokenizer)
    monkeypatch.setattr(text_file, "prepare", lambda *args, **kwargs: pytest.fail("tokenised again"))
    assert cached(corpus, tmp_path, tokenizer) == folder
    assert names_in(tmp_path / "cache") == [folder.name]


def test_a_changed_file_is_tokenised_again_and_its_fingerprint_changes(corpus, tmp_path, tokenizer):
    before = cached(corpus, tmp_path, tokenizer)
    changed = documents()
    changed[0] = changed[0].replace(changed[0][0], "#", 1)
    size_bytes = corpus.stat().st_size
    write_jsonl(corpus, changed)
    os.utime(corpus, ns=(0, corpus.stat().st_mtime_ns + 1))  # clocks of file systems may be coarse
    assert corpus.stat().st_size == size_bytes
    after = cached(corpus, tmp_path, tokenizer)
    assert after != before
    assert open_token_bins(after)[0].fingerprint != open_token_bins(before)[0].fingerprint


def test_a_touched_file_keeps_its_fingerprint(corpus, tmp_path, tokenizer):
    before = open_token_bins(cached(corpus, tmp_path, tokenizer))[0].fingerprint
    os.utime(corpus, ns=(0, 1))
    assert open_token_bins(cached(corpus, tmp_path, tokenizer))[0].fingerprint == before


def test_another_text_field_is_another_folder(corpus, tmp_path, tokenizer):
    cached(corpus, tmp_path, tokenizer)
    with pytest.raises(DataError, match="--text_field"):
        cached(corpus, tmp_path, tokenizer, text_field="content")


def test_a_file_that_grows_while_it_is_read_is_refused(corpus, tmp_path, tokenizer, monkeypatch):
    really_prepare = text_file.prepare

    def prepare_and_grow(*args, **kwargs):
        really_prepare(*args, **kwargs)
        with open(corpus, "a") as file:
            file.write('{"text": "more"}\n')

    monkeypatch.setattr(text_file, "prepare", prepare_and_grow)
    with pytest.raises(DataError, match="changed while they were read"):
        cached(corpus, tmp_path, tokenizer)


def test_being_overtaken_by_another_node_is_fine(corpus, tmp_path, tokenizer, monkeypatch):
    really_prepare = text_file.prepare

    def prepare_twice(*args, **kwargs):
        really_prepare(*args, **kwargs)  # the other node
        return really_prepare(*args, **kwargs)

    monkeypatch.setattr(text_file, "prepare", prepare_twice)
    open_token_bins(cached(corpus, tmp_path, tokenizer))
