from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
from data_texts import documents, write_jsonl
from prepared import prepared

from hypershard.data.bins.nanogpt import is_nanogpt, open_nanogpt
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """What data/openwebtext/prepare.py leaves behind, in small."""
    tokens = np.random.default_rng(1).integers(0, 50257, 5000).astype(np.uint16)
    tokens[::100] = 50256
    (tmp_path / "data").mkdir()
    tokens[:4000].tofile(tmp_path / "data" / "train.bin")
    tokens[4000:].tofile(tmp_path / "data" / "val.bin")
    return tmp_path / "data"


def write_characters(folder, vocab_size=65, **more):
    """meta.pkl as data/shakespeare_char/prepare.py writes it, and tokens that fit."""
    meta = {
        "vocab_size": vocab_size,
        "itos": {i: chr(40 + i) for i in range(vocab_size)},
        "stoi": {chr(40 + i): i for i in range(vocab_size)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta | more))
    for name in ("train.bin", "val.bin"):
        (np.arange(1000) % 65).astype(np.uint16).tofile(folder / name)


def test_gpt2_tokens_are_read_as_they_are(folder):
    assert is_nanogpt(folder)
    train, val = open_nanogpt(folder, None)
    assert (train.num_tokens, val.num_tokens) == (4000, 1000)
    assert (train.vocab_size, train.eos_token_id, train.tokenizer_path) == (50257, 50256, None)
    assert train.document_starts is None and train.targets(0, 10) is None
    stored = np.fromfile(folder / "train.bin", dtype="<u2")
    np.testing.assert_array_equal(train.read(17, 100), stored[17:117].astype(np.int64))


def test_characters_take_their_vocabulary_from_the_pickle(folder):
    write_characters(folder)
    train, _ = open_nanogpt(folder, None)
    assert (train.vocab_size, train.eos_token_id) == (65, None)
    assert train.read(0, 3).tolist() == [0, 1, 2]


def test_a_folder_of_token_bins_is_none_even_without_its_meta(tmp_path):
    prepared(write_jsonl(tmp_path / "a.jsonl", documents()), tmp_path / "bins")
    assert not is_nanogpt(tmp_path / "bins")
    (tmp_path / "bins" / "meta.json").unlink()
    assert not is_nanogpt(tmp_path / "bins")


def test_the_fingerprint_follows_the_data_and_not_the_place(folder, tmp_path):
    train, val = open_nanogpt(folder, None)
    before = train.fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "train.bin", ns=(0, 1))
    assert open_nanogpt(tmp_path / "copy", None)[0].fingerprint == before != val.fingerprint
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")
    tokens[2000] ^= 1
    tokens.tofile(folder / "train.bin")
    assert open_nanogpt(folder, None)[0].fingerprint != before


def test_the_ends_of_a_large_file_are_in_its_fingerprint(folder):
    size_bytes = 80 * 2**20
    seen = set()
    for change in (None, 0, size_bytes - 1, size_bytes):
        with open(folder / "train.bin", "wb") as file:
            file.truncate(max(size_bytes, 2 * (change or 0) - size_bytes) + 2 * (change == size_bytes))
            if change is not None and change < size_bytes:
                file.seek(change)
                file.write(b"\1")
        seen.add(open_nanogpt(folder, None)[0].fingerprint)
    assert len(seen) == 4


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(folder):
    write_characters(folder, vocab_size=60)
    train, _ = open_nanogpt(folder, None)
    with pytest.raises(DataError, match=r"id 64 at token 64; expected ids below 60 .*meta\.pkl"):
        train.read(0, 100)


@pytest.mark.parametrize("size_bytes", [0, 2, 7])
def test_files_of_impossible_sizes_are_refused(folder, size_bytes):
    (folder / "val.bin").write_bytes(b"0" * size_bytes)
    with pytest.raises(DataError, match=rf"val\.bin has {size_bytes} bytes; expected an even number, 4 at least"):
        open_nanogpt(folder, None)


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path, protocol):
    content = pickle.dumps({"vocab_size": 65, "stoi": Harmful(tmp_path / "harm")}, protocol=protocol)
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.pkl: not read: it names .*mkdir, which could run code"):
        open_nanogpt(folder, None)
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)  # which it would have done
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"vocab_size": 65})[:-5],
        pickle.dumps([65]),
        pickle.dumps({"stoi": {}}),
        pickle.dumps({"vocab_size": "65"}),
        pickle.dumps({"vocab_size": True}),
        pickle.dumps({"vocab_size": 65537}),
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # would make room for two billion objects
        b"Pother\n.",  # a persistent id
        b"\x82\x01.",  # a registered extension
    ],
    ids=range(11),
)
def test_other_pickles_are_refused(folder, content):
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.pkl.*expected a dict of vocab_size"):
        open_nanogpt(folder, None)


def test_a_pickle_too_large_is_refused(folder):
    with open(folder / "meta.pkl", "wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(DataError, match="more than 16777216 bytes"):
        open_nanogpt(folder, None)


def test_a_tokenizer_can_only_agree(folder):
    with pytest.raises(DataError, match=r"found 4096 ids.*has 50257"):
        open_nanogpt(folder, str(TOKENIZER_PATH))
    write_characters(folder, vocab_size=4096)
    assert open_nanogpt(folder, str(TOKENIZER_PATH))[0].tokenizer_path == TOKENIZER_PATH
