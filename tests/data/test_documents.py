from __future__ import annotations

import gzip
import json
import lzma

import pytest

from hypershard.data import documents
from hypershard.data.documents import find_text_files, read_pieces
from hypershard.errors import DataError


def texts(path, text_field="text"):
    """The documents of one file, pieces put together."""
    (file,) = find_text_files([path])
    found, parts = [], []
    for piece in read_pieces(file, text_field=text_field):
        parts.append(piece.text)
        if piece.ends_document:
            found.append("".join(parts))
            parts = []
    assert not parts
    return found


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_jsonl_lines_are_documents(tmp_path, suffix):
    content = '{"text": "one"}\n\n{"text": "", "id": 2}\n{"id": 3, "text": "three\\nlines ☃"}'.encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(content))
    assert texts(path) == ["one", "three\nlines ☃"]


def test_another_text_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": "no"}\n')
    assert texts(path, "content") == ["one"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "found list"),
        ('{"content": "b"}', "found keys 'content'; expected text under 'text'; --text_field"),
        ('{"text": 5}', "found int under 'text'"),
        ('{"text": "\\ud800"}', "UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl line 3: .*{said}"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8"):
        texts(tmp_path / name)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_packed_file_cut_off_is_refused(tmp_path, suffix, pack):
    content = "".join(json.dumps({"text": f"line {i * 7919}"}) + "\n" for i in range(2000))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(content.encode())[:-100])
    with pytest.raises(DataError, match="damaged or cut off"):
        texts(path)


def test_txt_is_one_document_or_parted_by_end_of_text_lines(tmp_path):
    (tmp_path / "one.txt").write_text("first\n\nsecond\n")
    assert texts(tmp_path / "one.txt") == ["first\n\nsecond\n"]
    (tmp_path / "many.txt").write_text("first\n<|endoftext|>\n  \n<|endoftext|>\nsecond <|endoftext|> still\n")
    assert texts(tmp_path / "many.txt") == ["first\n", "second <|endoftext|> still\n"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.txt") == ["one"]


def test_a_long_txt_document_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    lines = [f"line {i}\n" for i in range(40)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (file,) = find_text_files([tmp_path / "a.txt"])
    pieces = list(read_pieces(file, text_field="text"))
    assert "".join(piece.text for piece in pieces) == "".join(lines)
    assert len(pieces) > 5 and [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def test_names_choose_the_split(tmp_path, caplog):
    touch(
        tmp_path, "train/a.txt", "c4-validation.00000.txt", "deep/val.txt", "README.txt", ".hidden/train.txt", "x.bin"
    )
    found = {str(file.path.relative_to(tmp_path)): file.split for file in find_text_files([tmp_path])}
    assert found == {"train/a.txt": "train", "c4-validation.00000.txt": "val", "deep/val.txt": "val"}


def test_words_that_only_begin_like_a_split_do_not_choose_one(tmp_path):
    touch(tmp_path, "trainspotting.txt", "valley.txt", "b/values.txt")
    assert [file.split for file in find_text_files([tmp_path])] == [None, None, None]


def test_what_holds_no_text_is_refused(tmp_path):
    touch(tmp_path, "a/x.parquet", "only/val.txt")
    with pytest.raises(DataError, match=r"found x\.parquet; expected files that end in \.txt"):
        find_text_files([tmp_path / "a"])
    with pytest.raises(DataError, match="another kind"):
        find_text_files([tmp_path / "a" / "x.parquet"])
    with pytest.raises(DataError, match="nothing there"):
        find_text_files([tmp_path / "missing"])
    with pytest.raises(DataError, match="only validation files"):
        find_text_files([tmp_path / "only"])
