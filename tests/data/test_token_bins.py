from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from data_texts import documents, write_jsonl
from prepared import TEMPLATE, prepared, spec_of

from hypershard.data.bins.meta import read_meta
from hypershard.data.bins.token_bins import dtype_for, numpy_dtype, open_token_bins, verify
from hypershard.errors import DataError


@pytest.fixture
def bins(tmp_path):
    folder = tmp_path / "bins"
    prepared(write_jsonl(tmp_path / "text.jsonl", documents()), folder)
    return folder


@pytest.fixture
def chat_bins(tmp_path):
    """A folder with files of targets."""
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in documents(60)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    folder = tmp_path / "chat_bins"
    prepared(path, folder, spec=spec_of(chat_template=tmp_path / "chat.jinja"))
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
    assert int((tokens == train.eos_token_id).sum()) == train.num_documents == len(train.document_starts)
    np.testing.assert_array_equal(train.document_starts[1:], np.flatnonzero(tokens == train.eos_token_id)[:-1] + 1)
    np.testing.assert_array_equal(train.read(10, 5), tokens[10:15])
    assert train.targets(0, train.num_tokens) is None


def test_targets_are_read_as_they_were_written(chat_bins):
    train, _ = open_token_bins(chat_bins)
    targets = train.targets(0, train.num_tokens)
    assert targets.dtype == np.bool_ and 0 < targets.sum() < len(targets) == train.num_tokens
    np.testing.assert_array_equal(train.targets(10, 5), targets[10:15])


@pytest.mark.parametrize("name", ["train.bin", "val.starts", "train.targets"])
def test_a_truncated_file_is_refused(chat_bins, name):
    expected_bytes = (chat_bins / name).stat().st_size
    with open(chat_bins / name, "r+b") as file:
        file.truncate(expected_bytes - 1)
    with pytest.raises(DataError, match=rf"{name} has {expected_bytes - 1} bytes; expected {expected_bytes} .*prepare"):
        open_token_bins(chat_bins)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.starts", "val.targets", "meta.json", "tokenizer.json"])
def test_a_missing_file_is_refused(chat_bins, name):
    (chat_bins / name).unlink()
    with pytest.raises(DataError, match=name):
        open_token_bins(chat_bins)


def test_an_empty_split_is_refused(bins):
    for name in ("val.bin", "val.starts"):
        (bins / name).write_bytes(b"")
    empty = json.loads((bins / "meta.json").read_text())["val"] | {"num_tokens": 0, "num_documents": 0}
    change_meta(bins, val=empty)
    with pytest.raises(DataError, match="'val' holds 0 tokens"):
        open_token_bins(bins)


OUTSIDE = {"name": "../secret", "size_bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 1}, "format_version 1; expected .* format_version 3; make the folder again"),
        ({"dtype": "int8"}, "int8"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"train": {"tokens": {}}}, "num_tokens"),
        ({"train": []}, "SplitMeta"),
        ({"val": {"num_tokens": 9, "num_documents": 1, "tokens": {}, "starts": {}, "targets": None}}, "name"),
        (
            {"val": {"num_tokens": 9, "num_documents": 1, "tokens": OUTSIDE, "starts": OUTSIDE, "targets": None}},
            r"names '\.\./secret'",
        ),
    ],
)
def test_a_meta_that_says_something_else_is_refused(bins, changes, named):
    change_meta(bins, **changes)
    with pytest.raises(DataError, match=named):
        read_meta(bins)


def test_bins_from_before_kinds_were_named_open_as_they_were(bins, chat_bins):
    for folder, kind in ((bins, "text"), (chat_bins, "chat")):
        before = open_token_bins(folder)[0]
        meta = json.loads((folder / "meta.json").read_text()) | {"format_version": 2}
        del meta["kind"]
        (folder / "meta.json").write_text(json.dumps(meta))
        after = open_token_bins(folder)[0]
        assert (before.kind, before.fingerprint) == (after.kind, after.fingerprint) and after.kind == kind


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


def test_a_target_other_than_0_and_1_is_refused_where_it_is_read(chat_bins):
    targets = np.fromfile(chat_bins / "train.targets", dtype="u1")
    targets[20] = 7
    targets.tofile(chat_bins / "train.targets")
    train, _ = open_token_bins(chat_bins)
    assert len(train.targets(0, 20)) == 20
    with pytest.raises(DataError, match="7 at token 20; expected 0 or 1"):
        train.targets(15, 10)


def test_another_tokenizer_in_the_folder_is_refused(bins):
    with open(bins / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="not the tokenizer that made the tokens"):
        open_token_bins(bins)


def test_the_fingerprint_follows_the_data_and_not_the_place(bins, tmp_path):
    train, val = open_token_bins(bins)
    shutil.copytree(bins, tmp_path / "copy")
    assert open_token_bins(tmp_path / "copy")[0].fingerprint == train.fingerprint != val.fingerprint
    prepared(write_jsonl(tmp_path / "other.jsonl", ["a mat", *documents()[1:]]), tmp_path / "other")
    assert open_token_bins(tmp_path / "other")[0].fingerprint != train.fingerprint


@pytest.mark.parametrize("kind", ["tokens", "starts", "targets"])
def test_the_fingerprint_covers_every_file(chat_bins, kind):
    before = open_token_bins(chat_bins)[0].fingerprint
    train = json.loads((chat_bins / "meta.json").read_text())["train"]
    change_meta(chat_bins, train=train | {kind: train[kind] | {"sha256": "another"}})
    assert open_token_bins(chat_bins)[0].fingerprint != before


def test_what_was_just_made_is_verified(bins, chat_bins):
    assert verify(bins) == verify(chat_bins) == []


@pytest.mark.parametrize(
    "name", ["train.bin", "val.bin", "train.starts", "val.starts", "train.targets", "val.targets", "tokenizer.json"]
)
def test_verify_finds_a_flipped_byte(chat_bins, name):
    content = bytearray((chat_bins / name).read_bytes())
    content[len(content) // 2] ^= 1
    (chat_bins / name).write_bytes(content)
    problems = verify(chat_bins)
    assert len(problems) == 1 and name in problems[0] and "expected" in problems[0]


def test_verify_finds_missing_files(bins):
    (bins / "val.bin").unlink()
    assert ["val.bin" in problem for problem in verify(bins)] == [True]
    (bins / "meta.json").unlink()
    assert len(verify(bins)) == 1


def test_ids_are_stored_small_and_little_endian():
    assert dtype_for(65536) == "uint16" and dtype_for(65537) == "uint32"
    assert np.array([258], dtype=numpy_dtype("uint16")).tobytes() == b"\x02\x01"
    assert np.array([65536], dtype=numpy_dtype("uint32")).tobytes() == b"\x00\x00\x01\x00"
