"""Every format, packed or not, local or on S3: the same documents whole, by parts, and from the middle on."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import boto3
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from tests.conftest import BUCKET

from hypershard.data.read import documents
from hypershard.data.read.documents import read_documents
from hypershard.data.records import WHOLE, DataFile, Part
from hypershard.errors import DataError
from hypershard.remote_files import list_files

NUM_ROWS = 60
ROWS = [
    {
        "id": i,
        "text": f"document {i} ☃ " * (i % 9 + 1),
        "messages": [{"role": "user", "content": f"turn {i}"}] * (i % 3),
    }
    for i in range(NUM_ROWS)
]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    # With a checksum, as the zstd command writes; without one nobody can tell damaged text from text.
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TABLES = ("groups.parquet", "one_group.parquet", "stream.arrow", "file.arrow")
NAMES = [f"{stem}{packing}" for stem in ("a.jsonl", "b.json", "c.txt") for packing in PACK] + list(TABLES)
PLACES = ("local", "s3")


def write(folder, name):
    """ROWS as a file of the format that `name` says, in a folder."""
    path = folder / name
    table = pa.Table.from_pylist(ROWS)
    if name.endswith(".parquet"):
        parquet.write_table(table, path, row_group_size=7 if name.startswith("groups") else NUM_ROWS)
    elif name.endswith(".arrow"):
        new = pa.ipc.new_stream if name.startswith("stream") else pa.ipc.new_file
        with open(path, "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    elif ".json" in name:
        lines = [json.dumps(row, ensure_ascii=bool(row["id"] % 2)) + "\n" * (1 + row["id"] % 2) for row in ROWS]
        path.write_bytes(PACK[packing_of(name)]("".join(lines).encode()))
    else:
        path.write_bytes(PACK[packing_of(name)]("\n<|endoftext|>\n".join(row["text"] for row in ROWS).encode()))
    return path


def packing_of(name):
    return next((suffix for suffix in PACK if suffix and name.endswith(suffix)), "")


def listed(path):
    return DataFile(location=str(path), size_bytes=path.stat().st_size, version="", split=None)


def read(file, part=WHOLE, skip=0, columns=("text", "messages", "absent")):
    return list(read_documents(file, columns=columns, part=part, skip=skip))


def text_of(document):
    content = document.content
    if isinstance(content, bytes):
        content = json.loads(content)
    return content if isinstance(content, str) else content["text"]


@pytest.fixture(scope="module")
def places(tmp_path_factory, s3_server):
    """(place, name) -> the file as a listing gives it."""
    folder = tmp_path_factory.mktemp("documents")
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    found = {("local", name): listed(write(folder, name)) for name in NAMES}
    for name in NAMES:
        client.put_object(Bucket=BUCKET, Key=f"documents/{name}", Body=(folder / name).read_bytes())
    for file in list_files(f"s3://{BUCKET}/documents"):
        one = DataFile(location=file.location, size_bytes=file.size_bytes, version=file.version, split=None)
        found["s3", one.name] = one
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_whole_by_parts_and_from_the_middle(places, name, place):
    file = places[place, name]
    whole = read(file)
    assert [text_of(document).strip("\n") for document in whole] == [row["text"].strip("\n") for row in ROWS]
    assert [document.number for document in whole] == sorted({document.number for document in whole})
    assert whole[-1].read_bytes <= file.size_bytes and whole[-1].location == file.location
    if name in TABLES:
        assert [document.content["messages"] for document in whole] == [row["messages"] for row in ROWS]
        assert set(whole[0].content) == {"text", "messages"} and whole[4].where == f"{file.location} row 5"
    for skip in (1, 8, NUM_ROWS - 1, NUM_ROWS, 1000):
        assert read(file, skip=skip) == whole[skip:]
    for count in (2, 9) if place == "local" else (3,):
        parts = [read(file, Part(index=index, count=count)) for index in range(count)]
        assert Counter(text_of(one) for part in parts for one in part) == Counter(text_of(one) for one in whole)
        assert all(parts[:-1])
        for index, part in enumerate(parts):
            assert read(file, Part(index=index, count=count), skip=3) == part[3:]


def test_more_parts_than_documents_leave_some_empty(places):
    for name in ("a.jsonl", "groups.parquet", "c.txt.gz"):
        parts = [read(places["local", name], Part(index=index, count=100)) for index in range(100)]
        assert sum(map(len, parts)) == NUM_ROWS and [] in parts


def test_parts_of_parquet_are_row_groups_where_there_are_enough(places):
    numbers = [document.number for document in read(places["local", "groups.parquet"], Part(index=1, count=3))]
    assert numbers == [*range(8, 15), *range(29, 36), *range(50, 57)]
    numbers = [document.number for document in read(places["local", "one_group.parquet"], Part(index=1, count=3))]
    assert numbers == list(range(2, NUM_ROWS + 1, 3))


def test_every_cut_of_json_lines_gives_each_line_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"b": 22}\r\n{"c": "' + b"x" * 40 + b'"}\n{"d": 4}')
    whole = [document.content for document in read(listed(path))]
    assert whole[0] == b'{"a": 1}\n' and whole[3] == b'{"d": 4}'
    for count in range(1, 90):
        assert [one.content for i in range(count) for one in read(listed(path), Part(index=i, count=count))] == whole


def test_a_line_of_a_later_part_is_found_by_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0123456789\n" * 10)
    document = read(listed(path), Part(index=1, count=2))[1]
    assert document.where == f"{path} line 2 (counted from byte 55)"
    assert path.read_bytes()[55:].splitlines()[1] == document.content.strip()


@pytest.mark.parametrize("name", [name for name in NAMES if packing_of(name) or name in TABLES])
def test_a_file_cut_off_is_named_wherever_it_is_cut(tmp_path, name):
    path = write(tmp_path, name)
    content = path.read_bytes()
    for kept in (0, 1, 5, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match=rf"{name}: .*(cut off|found no bytes).*copy") as refused:
            read(listed(path))
        assert not refused.value.shared_by_all_ranks  # else the rank that met it would not print it


@pytest.mark.parametrize("packing", [suffix for suffix in PACK if suffix])
def test_damage_in_a_packed_file_is_named_with_the_line_reached(tmp_path, packing):
    lines = "".join(json.dumps({"text": os.urandom(30).hex()}) + "\n" for _ in range(30_000)).encode()
    packed = bytearray(PACK[packing](lines))
    for i in range(200):
        packed[len(packed) * 3 // 4 + i] ^= 0xFF
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged or cut off after line \d+ "):
        read(listed(path))


def test_packed_files_one_behind_the_other_are_one(tmp_path):
    for packing in (".gz", ".xz", ".bz2", ".zst"):
        path = tmp_path / f"a.jsonl{packing}"
        path.write_bytes(PACK[packing](b"1\n2") + PACK[packing](b"3\n4\n"))
        assert [one.content for one in read(listed(path))] == [b"1\n", b"23\n", b"4\n"]
    # Parallel programs put frames to be skipped between those with content.
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    path.write_bytes(skipped + PACK[".zst"](b"1\n") + skipped + PACK[".zst"](b"2\n") + skipped)
    assert [one.content for one in read(listed(path))] == [b"1\n", b"2\n"]


def test_damaged_columns_of_parquet_are_named_with_the_row(tmp_path):
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(1000)]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=100, use_dictionary=False, write_page_checksum=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: damaged or cut off after row [1-9]\d* "):
        read(listed(path))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_none_of_the_columns_is_refused(places, name):
    with pytest.raises(DataError, match=r"found columns 'id', 'text', 'messages'; expected 'content'; --text_field"):
        read(places["local", name], columns=("content",))


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    file = listed(path)
    path.write_text("{}\n{}\n")
    with pytest.raises(DataError, match="found 6 bytes; expected the 3"):
        read(file)


def test_an_array_of_json_is_refused_with_what_mends_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"}\n]\n')
    with pytest.raises(DataError, match=r"found a JSON array; .*jq -c"):
        read(listed(path))


def test_txt_is_one_document_or_parted_by_end_of_text_lines(tmp_path):
    one, many = tmp_path / "one.txt", tmp_path / "many.txt"
    one.write_text("\ufefffirst\n\nsecond\n", encoding="utf-8")
    assert [document.content for document in read(listed(one))] == ["first\n\nsecond\n"]
    many.write_text("first\n<|endoftext|>\n  \n<|endoftext|>\nsecond <|endoftext|> still\n")
    found = read(listed(many))
    assert [(one.content, one.number) for one in found] == [("first\n", 1), ("second <|endoftext|> still\n", 5)]


def test_a_long_txt_document_comes_in_pieces_and_belongs_to_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    texts = ["".join(f"{name} line {i}\n" for i in range(40)) for name in "abc"]
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>\n".join(texts))
    pieces = read(listed(path))
    assert len(pieces) > 15 and [piece.ends_document for piece in pieces].count(True) == 3
    assert "".join(piece.content for piece in pieces) == "".join(texts)
    assert all(piece.content.endswith("\n") for piece in pieces if not piece.ends_document)
    for index, expected in ((0, texts[0] + texts[2]), (1, texts[1])):
        part = read(listed(path), Part(index=index, count=2))
        assert "".join(piece.content for piece in part) == expected
    assert read(listed(path), skip=2) == [piece for piece in pieces if piece.number > 81]


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nalso\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt line 3: not UTF-8"):
        read(listed(path))


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert [document.content["text"] for document in read(listed(path))] == [row["text"] for row in ROWS]
