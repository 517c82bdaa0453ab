from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from data_texts import documents, write_jsonl

from hypershard.data.prepare import prepare
from hypershard.data.token_bins import dtype_for, numpy_dtype, open_token_bins, read_meta
from hypershard.errors import DataError


@pytest.fixture
def bins(tmp_path, tokenizer):
    folder = tmp_path / "bins"
    prepare([write_jsonl(tmp_path / "text.jsonl", documents())], folder, tokenizer)
    return folder


def change_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_opens_what_prepare_made(bins, tokenizer):
    train, val = open_token_bins(bins)
    assert train.vocab_size == tokenizer.vocab_size == 4096
    assert train.eos_token_id == tokenizer.eos_token_id
    assert train.num_documents + val.num_documents == 120
    assert train.tokenizer_path == bins / "tokenizer.json"
    tokens = train.read(0, train.num_tokens)
    assert tokens.dtype == np.int64
    assert int((tokens == train.eos_token_id).sum()) == train.num_documents
    np.testing.assert_array_equal(train.read(10, 5), tokens[10:15])


def test_a_truncated_file_is_refused(bins):
    expected_bytes = (bins / "train.bin").stat().st_size
    with open(bins / "train.bin", "r+b") as file:
        file.truncate(expected_bytes - 2)
    with pytest.raises(
        DataError, match=rf"train\.bin has {expected_bytes - 2} bytes; expected {expected_bytes} .*prepare"
    ):
        open_token_bins(bins)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
def test_a_missing_file_is_refused(bins, name):
    (bins / name).unlink()
    with pytest.raises(DataError, match=name):
        open_token_bins(bins)


def test_an_empty_split_is_refused(bins):
    (bins / "val.bin").write_bytes(b"")
    empty = json.loads((bins / "meta.json").read_text())["val"] | {"num_tokens": 0}
    change_meta(bins, val=empty)
    with pytest.raises(DataError, match="'val' holds 0 tokens"):
        open_token_bins(bins)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 99}, "format_version 1"),
        ({"dtype": "int8"}, "int8"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"train": {"file": "train.bin"}}, "num_tokens"),
    ],
)
def test_a_meta_that_says_something_else_is_refused(bins, changes, named):
    change_meta(bins, **changes)
    with pytest.raises(DataError, match=named):
        read_meta(bins)


def test_a_damaged_meta_is_refused(bins):
    (bins / "meta.json").write_text('{"format": "hyper')
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        read_meta(bins)


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(bins):
    tokens = np.fromfile(bins / "train.bin", dtype="<u2")
    tokens[20] = 4096
    tokens.tofile(bins / "train.bin")
    train, _ = open_token_bins(bins)
    assert len(train.read(0, 20)) == 20
    with pytest.raises(DataError, match="id 4096 at token 20; expected ids below 4096"):
        train.read(15, 10)


def test_another_tokenizer_in_the_folder_is_refused(bins):
    with open(bins / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="not the tokenizer that made the tokens"):
        open_token_bins(bins)


def test_the_fingerprint_follows_the_data_and_not_the_place(bins, tmp_path, tokenizer):
    train, val = open_token_bins(bins)
    shutil.copytree(bins, tmp_path / "copy")
    assert open_token_bins(tmp_path / "copy")[0].fingerprint == train.fingerprint != val.fingerprint
    prepare([write_jsonl(tmp_path / "other.jsonl", ["a mat", *documents()[1:]])], tmp_path / "other", tokenizer)
    assert open_token_bins(tmp_path / "other")[0].fingerprint != train.fingerprint


def test_ids_are_stored_small_and_little_endian():
    assert dtype_for(65536) == "uint16" and dtype_for(65537) == "uint32"
    assert np.array([258], dtype=numpy_dtype("uint16")).tobytes() == b"\x02\x01"
    assert np.array([65536], dtype=numpy_dtype("uint32")).tobytes() == b"\x00\x00\x01\x00"
