"""A file's documents as they lie there, one after another: lines of JSON, parts of a text, rows of a table.

Nothing is held but a line (JSON), about a MiB (.txt) or a batch of rows, so the size of a file does not matter, and
nothing is parsed: that is the encoder's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import DataError, UserError
from ...remote_files import open_file
from ...storage import readable_errors
from ..records import DataFile, Part, RawDocument
from .formats import UNDERSTOOD, format_of
from .packed import Damaged, unpacked
from .tables import arrow_rows, parquet_rows

# A line of a .txt file that holds just this separates documents, as in the files of GPT-2 and TinyStories.
TXT_SEPARATOR = b"<|endoftext|>"
# A long .txt document is handed on in pieces that end at a line's end; the tokenizer never sees it whole.
PIECE_BYTES = 2**20
# Some programs put a byte-order mark before the first character.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How often a packed file is asked how far it has been read.
_LINES_PER_LOOK = 64

# Number from 1 (from where the reading began), the line with its end, bytes of the stored file read so far.
_Line = tuple[int, bytes, int]


def read_documents(file: DataFile, *, columns: Sequence[str], part: Part, skip: int) -> Iterator[RawDocument]:
    """The documents of one part of a file, without the part's first `skip`.

    Of a table's rows only `columns` are read; one that the table lacks is missing in the rows. Part i of n holds: of
    unpacked JSON lines the lines that start in the i-th n-th of the file's bytes; of Parquet with n row groups or
    more every n-th row group from i on; of all else every n-th document from i on.
    DataError: a damaged file (named with the line or row), another size than listed, a .txt that is not UTF-8, or a
    table with none of the columns. StorageError: a disk or bucket that refuses.
    """
    try:
        yield from _documents(file, columns=columns, part=part, skip=skip)
    except UserError as error:
        error.shared_by_all_ranks = False  # the others read other files
        raise


def _documents(file: DataFile, *, columns: Sequence[str], part: Part, skip: int) -> Iterator[RawDocument]:
    found = format_of(file.name)
    if found is None:
        raise DataError(f"--dataset: found {file.location}, a file of another kind; expected {UNDERSTOOD}")
    if found.packing and not file.size_bytes:
        raise DataError(f"{file.location}: found no bytes; expected a file packed as {found.packing}; copy it again")
    with readable_errors(Path(file.location), "reading"), open_file(file.location, size_bytes=file.size_bytes) as raw:
        if found.name == "parquet":
            yield from parquet_rows(file, raw, columns=columns, part=part, skip=skip)
        elif found.name == "arrow":
            yield from arrow_rows(file, raw, columns=columns, part=part, skip=skip)
        elif found.name == "txt":
            yield from _texts(file, _lines(file, raw, found.packing), part=part, skip=skip)
        else:
            yield from _json_lines(file, raw, found.packing, part=part, skip=skip)


def _lines(file: DataFile, raw: BinaryIO, packing: str) -> Iterator[_Line]:
    """All lines of a file, unpacked on the way, without a byte-order mark."""
    number = read_bytes = 0
    try:
        for number, line in enumerate(unpacked(raw, packing), start=1):
            if not packing:
                read_bytes += len(line)
            elif number % _LINES_PER_LOOK == 1:
                read_bytes = raw.tell()
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, read_bytes
    except Damaged as error:
        raise DataError(
            f"{file.location}: damaged or cut off after line {number} ({error}); copy the file again"
        ) from error


def _lines_between(raw: BinaryIO, first_byte: int, end_byte: int) -> Iterator[_Line]:
    """The lines of an unpacked file that start at `first_byte` or later and before `end_byte`."""
    position = 0
    if first_byte:
        # The byte before tells whether a line starts at `first_byte` itself.
        position = raw.seek(first_byte - 1)
        position += len(raw.readline())
    for number in itertools.count(1):
        line = raw.readline() if position < end_byte else b""
        if not line:
            return
        content = line if position else line.removeprefix(_BYTE_ORDER_MARK)
        position += len(line)
        yield number, content, position


def _json_lines(file: DataFile, raw: BinaryIO, packing: str, *, part: Part, skip: int) -> Iterator[RawDocument]:
    cut_by_bytes = not packing and part.count > 1
    first_byte = file.size_bytes * part.index // part.count if cut_by_bytes else 0
    end_byte = file.size_bytes * (part.index + 1) // part.count
    found = _lines_between(raw, first_byte, end_byte) if cut_by_bytes else _lines(file, raw, packing)
    lines = (line for line in found if not line[1].isspace())
    start, step = (skip, 1) if cut_by_bytes else (part.index + skip * part.count, part.count)
    may_be_array = file.name.lower().removesuffix(packing).endswith(".json") and not first_byte
    for number, line, read_bytes in itertools.islice(lines, start, None, step):
        if may_be_array and number == 1 and line.lstrip().startswith(b"["):
            raise DataError(
                f"{file.location}: found a JSON array; expected an object per line, as `jq -c '.[]'` writes them"
            )
        yield RawDocument(
            content=line,
            location=file.location,
            number=number,
            ends_document=True,
            read_bytes=read_bytes,
            first_byte=first_byte,
        )


@dataclass
class _Held:
    """What has been read of a .txt document and not yet handed on."""

    begun: bool = False  # an earlier piece has been handed on
    has_text: bool = False
    number: int = 0
    num_bytes: int = 0
    lines: list[bytes] = field(default_factory=list)

    def add(self, number: int, line: bytes, *, keep: bool) -> None:
        self.number = self.number or number
        self.num_bytes += len(line)
        self.has_text = self.has_text or not line.isspace()
        if keep:
            self.lines.append(line)

    @property
    def is_document(self) -> bool:
        return self.begun or self.has_text

    def piece(self, location: str, read_bytes: int, *, ends_document: bool) -> RawDocument:
        return RawDocument(
            content=self._text(location),
            location=location,
            number=max(1, self.number),
            ends_document=ends_document,
            read_bytes=read_bytes,
        )

    def _text(self, location: str) -> str:
        try:
            return b"".join(self.lines).decode()
        except UnicodeDecodeError:
            for number, line in enumerate(self.lines, start=self.number):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    message = f"{location} line {number}: not UTF-8 ({error}); convert the file"
                    raise DataError(message) from error
            raise


def _texts(file: DataFile, lines: Iterator[_Line], *, part: Part, skip: int) -> Iterator[RawDocument]:
    """The documents of a .txt file in pieces; each belongs, with all its pieces, to one part."""

    def is_wanted(document: int) -> bool:
        return document % part.count == part.index and document // part.count >= skip

    held, document, read_bytes = _Held(), 0, 0
    for number, line, read_bytes in lines:
        if line.strip() == TXT_SEPARATOR:
            if held.is_document:
                if is_wanted(document):
                    yield held.piece(file.location, read_bytes, ends_document=True)
                document += 1
            held = _Held()
            continue
        held.add(number, line, keep=is_wanted(document))
        if held.num_bytes >= PIECE_BYTES:
            if is_wanted(document):
                yield held.piece(file.location, read_bytes, ends_document=False)
            held = _Held(begun=True, number=number + 1)
    if held.is_document and is_wanted(document):
        yield held.piece(file.location, read_bytes, ends_document=True)
