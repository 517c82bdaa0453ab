from __future__ import annotations

import gzip
import hashlib
import itertools
import json

import boto3
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_texts import documents, names_in, write_jsonl
from prepared import TEMPLATE, contents, decoded, listed, prepared, spec_of

from hypershard.data.bins import prepare as prepare_file
from hypershard.data.bins.token_bins import open_token_bins, verify
from hypershard.data.read.documents import read_documents
from hypershard.data.read.files import find_files
from hypershard.data.records import WHOLE
from hypershard.errors import DataError


def without_end(texts):
    return [text.removesuffix("<|endoftext|>") for text in texts]


def sha256s(folder):
    return [hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()[:12] for split in ("train", "val")]


def test_every_document_is_written_once(tmp_path, small_batches):
    texts = [f"{i}: {text}" for i, text in enumerate(documents(300))]
    meta = prepared(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "bins")
    train, val = open_token_bins(tmp_path / "bins")
    train_texts, val_texts = without_end(decoded(train)), without_end(decoded(val))
    assert sorted(train_texts + val_texts) == sorted(texts)
    assert train_texts == sorted(train_texts, key=texts.index)  # in the order of the file
    assert 10 < len(val_texts) == meta.val.num_documents < 60
    assert meta.train.num_documents == len(train_texts)
    ends = np.append(train.document_starts[1:], train.num_tokens)
    assert meta.longest_document_tokens >= int((ends - train.document_starts).max()) > 50
    assert np.all(train.read(0, train.num_tokens)[ends - 1] == train.eos_token_id)
    assert train.targets(0, 5) is None


LINES = "".join(json.dumps({"text": text}) + "\n" for text in documents(300))
LONG_LINES = "\n<|endoftext|>\n".join([*documents(100), "x\n" * 530_000, "the end"])


# What the first version of `prepare` wrote: token bins made long ago stay equal to those made today.
@pytest.mark.parametrize(
    ("text", "val_share", "expected"),
    [
        (LINES, 0.1, "c447c4036db5 e08c90773721"),
        (LINES, 1e-9, "e46eccaf3000 bbaed6b3ffea"),
        ("\n".join(documents(300)), 0.01, "f39ee37d81be bd2087279531"),
        (LONG_LINES, 0.3, "add4f04946e9 526f75e20a44"),
    ],
    ids=["share", "last document", "end of the only document", "pieces"],
)
def test_tokens_are_those_of_the_first_version(tmp_path, monkeypatch, text, val_share, expected):
    monkeypatch.setattr(prepare_file, "BYTES_PER_PROCESS", 1)
    path = tmp_path / ("a.jsonl" if text is LINES else "a.txt")
    path.write_text(text)
    prepared(path, tmp_path / "bins", val_share=val_share, num_processes=2 if text is LONG_LINES else 1)
    assert " ".join(sha256s(tmp_path / "bins")) == expected


def test_the_number_of_processes_changes_nothing(tmp_path, small_batches):
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(50))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", documents(60)).read_bytes()))
    (folder / "c.txt").write_text("\n<|endoftext|>\n".join(documents(40)))
    for num_processes in (1, 2):
        prepared(folder, tmp_path / f"bins{num_processes}", num_processes=num_processes)
    assert contents(tmp_path / "bins1") == contents(tmp_path / "bins2")


def test_every_format_gives_the_same_tokens(tmp_path):
    texts = documents(40)
    table = pyarrow.table({"text": texts, "meta": [1] * 40})
    line_file = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(line_file.read_bytes()))
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    names = ["a.jsonl", "a.json.gz", "a.parquet", "a.arrow"]
    found = []
    for name in names:
        prepared(tmp_path / name, tmp_path / f"bins {name}")
        found.append(sha256s(tmp_path / f"bins {name}"))
    assert found == found[:1] * len(names)


def test_a_bucket_gives_the_same_tokens(tmp_path, text_folder, s3_server, small_batches):
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    client.create_bucket(Bucket="texts")
    for path in text_folder.iterdir():
        client.upload_file(str(path), "texts", f"corpus/{path.name}")
    files = find_files("s3://texts/corpus", dataset_config_name=None, cache_dir=tmp_path / "hub")
    options = {"val_share": 0.1, "seed": 0, "malformed_rows": "refuse", "num_processes": 2}
    prepare_file.prepare(files, tmp_path / "bins", spec_of(), **options)
    prepared(text_folder, tmp_path / "whole")
    assert contents(tmp_path / "bins") == contents(tmp_path / "whole")


def test_conversations_keep_which_tokens_the_loss_counts(tmp_path, small_batches):
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in documents(40)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    spec = spec_of(chat_template=tmp_path / "chat.jinja")
    meta = prepared(path, tmp_path / "bins", spec=spec, num_processes=2)
    raw = [d for file in listed(path) for d in read_documents(file, columns=spec.columns, part=WHOLE, skip=0)]
    encoded = {one.tokens.tobytes(): one.targets for one in spec.build().encode(raw)}
    assert meta.train.num_documents + meta.val.num_documents == 40
    for source in open_token_bins(tmp_path / "bins"):
        starts = np.append(source.document_starts, source.num_tokens).tolist()
        for start, end in itertools.pairwise(starts):
            targets = source.targets(start, end - start)
            np.testing.assert_array_equal(targets, encoded[source.read(start, end - start).tobytes()])
            assert 0 < targets.sum() < end - start
    assert verify(tmp_path / "bins") == []


def test_the_split_depends_on_its_seed_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(200))
    metas = [prepared(path, tmp_path / f"bins{i}", val_share=0.2, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert metas[0] == metas[1] != metas[2]


def test_files_named_val_are_the_val_split(tmp_path):
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "train.jsonl", documents(20))
    write_jsonl(tmp_path / "text" / "val.jsonl", ["seen nowhere else"])
    prepared(tmp_path / "text", tmp_path / "bins", val_share=0.0)
    train, val = open_token_bins(tmp_path / "bins")
    assert without_end(decoded(val)) == ["seen nowhere else"]
    assert train.num_documents == 20


def test_where_no_document_is_picked_the_last_one_validates(tmp_path):
    texts = documents(30)
    texts[-1] = "a short last document"
    meta = prepared(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "bins", val_share=1e-9)
    train, val = open_token_bins(tmp_path / "bins")
    assert without_end(decoded(val)) == texts[-1:]
    assert without_end(decoded(train)) == texts[:-1]
    assert (meta.train.num_documents, meta.val.num_documents) == (29, 1)


def test_a_single_document_is_cut_for_validation(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(documents(200)))
    meta = prepared(tmp_path / "book.txt", tmp_path / "bins", val_share=0.01)
    train, val = open_token_bins(tmp_path / "bins")
    assert "".join(decoded(train) + decoded(val)).removesuffix("<|endoftext|>") == (tmp_path / "book.txt").read_text()
    assert 0.009 < val.num_tokens / (train.num_tokens + val.num_tokens) < 0.011
    assert (meta.train.num_documents, meta.val.num_documents) == (1, 1)
    assert val.document_starts.tolist() == [0]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', '{"text": "a"}\n'])
def test_text_that_is_empty_or_nearly_so_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="empty or nearly so"):
        prepared(tmp_path / "a.jsonl", tmp_path / "bins")
    assert names_in(tmp_path) == ["a.jsonl"]


def test_an_output_that_holds_something_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents())
    output = tmp_path / "bins"
    output.mkdir()
    prepared(path, output)  # empty is fine
    with pytest.raises(DataError, match="--output"):
        prepared(path, output)
    assert names_in(tmp_path) == ["a.jsonl", "bins"]


BAD_ROWS = ["{cut", '{"text": 5}', "[]", '{"other": "a"}', '{"text": null}', '{"text": ["a"]}', '"text"']


@pytest.fixture
def with_bad_rows(tmp_path):
    """120 documents, and seven rows that are none after the hundredth."""
    lines = write_jsonl(tmp_path / "a.jsonl", documents()).read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:100], *BAD_ROWS, *lines[100:]]) + "\n")
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_first_malformed_row_is_refused_and_what_was_done_is_kept(
    tmp_path, small_batches, with_bad_rows, num_processes
):
    with pytest.raises(DataError, match=r"a\.jsonl line 101: .*--malformed_rows=skip.*98 documents are done"):
        prepared(with_bad_rows, tmp_path / "bins", num_processes=num_processes)
    assert not (tmp_path / "bins").exists()
    seen = []
    meta = prepared(with_bad_rows, tmp_path / "bins", malformed_rows="skip", progress=seen.append)
    assert seen[0].num_documents > 98 and meta.num_malformed_rows == len(BAD_ROWS)
    write_jsonl(tmp_path / "good.jsonl", documents())
    prepared(tmp_path / "good.jsonl", tmp_path / "good")
    assert sha256s(tmp_path / "bins") == sha256s(tmp_path / "good")


def test_five_skipped_rows_are_named_and_all_are_counted(tmp_path, small_batches, with_bad_rows, monkeypatch):
    told = []
    monkeypatch.setattr(prepare_file.logger, "warning", told.append)
    meta = prepared(with_bad_rows, tmp_path / "bins", malformed_rows="skip")
    assert meta.num_malformed_rows == len(BAD_ROWS) == 7
    assert [line.split(": ")[1].split()[-1] for line in told] == ["101", "102", "103", "104", "105"]


def test_rows_skipped_by_a_stopped_run_are_refused_by_one_that_refuses(tmp_path, small_batches, with_bad_rows):
    def stop(done):
        if done.num_documents > 110:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(with_bad_rows, tmp_path / "bins", malformed_rows="skip", progress=stop)
    with pytest.raises(DataError, match="line 101"):
        prepared(with_bad_rows, tmp_path / "bins")


def test_progress_reaches_the_end(tmp_path, text_folder, small_batches):
    seen = []
    meta = prepared(text_folder, tmp_path / "bins", progress=seen.append)
    assert [one.read_bytes for one in seen] == sorted(one.read_bytes for one in seen)
    assert seen[-1].read_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in text_folder.iterdir())
    assert seen[-1].num_tokens == meta.train.num_tokens + meta.val.num_tokens


@pytest.mark.parametrize("val_share", [0, 1, -0.1])
def test_shares_outside_0_to_1_are_refused(tmp_path, val_share):
    with pytest.raises(DataError, match="--val_share"):
        prepared(write_jsonl(tmp_path / "a.jsonl", documents()), tmp_path / "bins", val_share=val_share)
