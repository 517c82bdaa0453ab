"""Text files as a stream of documents: which files, which split, and their text piece by piece.

Nothing is held but the current line (JSONL) or about a MiB (.txt), so the size of a file does not matter.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ..errors import DataError
from ..log import logger
from ..storage import readable_errors

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json.gz")
TXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")
# A line of a .txt file that holds just this separates documents, as in the files of GPT-2 and TinyStories.
TXT_SEPARATOR = b"<|endoftext|>"
# A long .txt document is handed on in pieces that end at a line's end; the tokenizer never sees it whole.
PIECE_BYTES = 2**20
# "train-0001.jsonl", "val/", "c4-validation.00000.json.gz", but not "trainspotting.txt".
_SPLIT_NAME = re.compile(r"(?:^|[._-])(train|val)(?:ing|id|idation)?(?=[._-]|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file to read. `split`: 'train' or 'val' where its name says so, else None."""

    path: Path
    size_bytes: int
    modified_ns: int
    split: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of a document, mostly all of it. `read_bytes`: how far its file has been read."""

    text: str
    ends_document: bool
    read_bytes: int


def find_text_files(inputs: Sequence[Path]) -> list[TextFile]:
    """The text files among `inputs` (files or folders, searched through), in a fixed order.

    Where names say train or val (a part of the path below the folder, such as `train/` or `c4-val.jsonl`), files
    of neither kind are left out with a warning. DataError: an input is missing, of another kind, or holds none.
    """
    files = [file for path in inputs for file in _files_of(path)]
    if not any(file.split for file in files):
        return files
    unused = [file.path for file in files if file.split is None]
    if unused:
        logger.warning(
            "%d files are not read, because others are named train or val: %s",
            len(unused),
            ", ".join(map(str, unused[:5])),
        )
    files = [file for file in files if file.split]
    if not any(file.split == "train" for file in files):
        raise DataError(
            f"--dataset: found only validation files, such as {files[0].path}; expected some named train as well"
        )
    return files


def is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(JSONL_SUFFIXES + TXT_SUFFIXES)


def _files_of(path: Path) -> list[TextFile]:
    suffixes = ", ".join(TXT_SUFFIXES + JSONL_SUFFIXES)
    if path.is_file():
        if not is_text_file(path):
            raise DataError(f"--dataset={path}: found a file of another kind; expected {suffixes}")
        return [_text_file(path, split=None)]
    if not path.is_dir():
        raise DataError(f"--dataset={path}: found nothing there; expected a text file or a folder of them")
    found = sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.relative_to(path) for file in found]
    texts = [name for name in names if is_text_file(name) and not any(part.startswith(".") for part in name.parts)]
    if not texts:
        shown = ", ".join(str(name) for name in names[:5]) or "nothing"
        raise DataError(f"--dataset={path}: found {shown}; expected files that end in {suffixes}")
    return [_text_file(path / name, split=_split_named(name)) for name in texts]


def _text_file(path: Path, *, split: str | None) -> TextFile:
    status = path.stat()
    return TextFile(path=path, size_bytes=status.st_size, modified_ns=status.st_mtime_ns, split=split)


def _split_named(name: Path) -> str | None:
    for part in name.parts:
        if match := _SPLIT_NAME.search(part):
            return match.group(1).lower()
    return None


def read_pieces(file: TextFile, *, text_field: str) -> Iterator[Piece]:
    """The documents of one file, empty ones left out. DataError names the file and line that cannot be read."""
    if file.path.name.lower().endswith(JSONL_SUFFIXES):
        return _jsonl_pieces(file.path, text_field)
    return _txt_pieces(file.path)


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(line number from 1, the line with its end, bytes of the file read so far), unpacked on the way."""
    with readable_errors(path, "reading"), open(path, "rb") as raw:
        unpacked: IO[bytes] = raw
        if path.suffix.lower() == ".gz":
            unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif path.suffix.lower() == ".xz":
            unpacked = cast(IO[bytes], lzma.LZMAFile(raw))  # noqa: SIM115 (`raw` is closed here; this holds nothing else)
        number = 0
        try:
            for number, line in enumerate(unpacked, start=1):
                yield number, line, raw.tell()
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{path}: damaged or cut off after line {number} ({error}); copy the file again") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        # Some programs put a byte-order mark before the first character.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number}: not UTF-8 ({error}); convert the file") from error


def _jsonl_pieces(path: Path, text_field: str) -> Iterator[Piece]:
    for number, line, read_bytes in _lines(path):
        if line.isspace():
            continue
        text = _text_of(_decode(line, path, number), text_field, where=f"{path} line {number}")
        if text and not text.isspace():
            yield Piece(text=text, ends_document=True, read_bytes=read_bytes)


def _text_of(line: str, text_field: str, *, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f'{where}: not JSON ({error}); expected one object per line, such as {{"{text_field}": "..."}}'
        ) from error
    if not isinstance(value, dict):
        raise DataError(f'{where}: found {type(value).__name__}; expected an object, such as {{"{text_field}": "..."}}')
    text = value.get(text_field)
    if not isinstance(text, str):
        found = (
            f"{type(text).__name__} under {text_field!r}"
            if text_field in value
            else f"keys {', '.join(map(repr, value))}"
        )
        raise DataError(f"{where}: found {found}; expected text under {text_field!r}; --text_field names the key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell halves of characters ("\\ud800") that no text can hold
        raise DataError(f"{where}: the text cannot be written as UTF-8 ({error}); mend or drop the line") from error
    return text


def _txt_pieces(path: Path) -> Iterator[Piece]:
    lines: list[str] = []
    held_bytes = read_bytes = 0
    begun = False  # an earlier piece of this document has been handed on
    for number, line, read_bytes in _lines(path):
        if line.strip() == TXT_SEPARATOR:
            yield from _last_piece(lines, begun, read_bytes)
            lines, held_bytes, begun = [], 0, False
            continue
        lines.append(_decode(line, path, number))
        held_bytes += len(line)
        if held_bytes >= PIECE_BYTES:
            yield Piece(text="".join(lines), ends_document=False, read_bytes=read_bytes)
            lines, held_bytes, begun = [], 0, True
    yield from _last_piece(lines, begun, read_bytes)


def _last_piece(lines: list[str], begun: bool, read_bytes: int) -> Iterator[Piece]:
    text = "".join(lines)
    if begun or (text and not text.isspace()):
        yield Piece(text=text, ends_document=True, read_bytes=read_bytes)
