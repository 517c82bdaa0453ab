"""Rows of Parquet and Arrow files as documents, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ...errors import DataError
from ..records import WHOLE, DataFile, Part, RawDocument

# Rows made into Python objects at a time.
_BATCH_ROWS = 256
# Of a column at a time; read ahead (`pre_buffer`), a file of one large row group would be held whole.
_READ_BYTES = 4 * 2**20
# An IPC file (Feather 2) begins so; anything else is a stream, as `datasets` writes it, and ends so.
# https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
_FILE_START = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows that are read together, or not at all. `read_bytes`: how far the file has been read after them."""

    first_row: int
    num_rows: int
    read_bytes: int
    batches: Iterable[Any]  # lazily: asking for the first one reads


def parquet_rows(
    file: DataFile, raw: BinaryIO, *, columns: Sequence[str], part: Part, skip: int
) -> Iterator[RawDocument]:
    """See `documents.read_documents`."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False)
        names = _wanted(file, table.schema_arrow.names, columns)
        group_rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except (ArrowException, OSError) as error:
        raise _damaged(file, 0, error) from error

    def batches(group: int) -> Iterator[Any]:
        yield from table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names)

    by_groups = len(group_rows) >= part.count
    blocks, first_row = [], 0
    for group, num_rows in enumerate(group_rows):
        if not by_groups or group % part.count == part.index:
            read_bytes = file.size_bytes * (first_row + num_rows) // max(1, sum(group_rows))
            blocks.append(_Block(first_row=first_row, num_rows=num_rows, read_bytes=read_bytes, batches=batches(group)))
        first_row += num_rows
    yield from _rows(file, blocks, part=WHOLE if by_groups else part, skip=skip)


def arrow_rows(
    file: DataFile, raw: BinaryIO, *, columns: Sequence[str], part: Part, skip: int
) -> Iterator[RawDocument]:
    """See `documents.read_documents`."""
    from pyarrow import ArrowException, ipc

    try:
        is_file = raw.read(len(_FILE_START)) == _FILE_START
        if not is_file:
            _require_end(file, raw)
        open_reader = ipc.open_file if is_file else ipc.open_stream
        raw.seek(0)
        all_names = open_reader(raw).schema.names
        indices = [all_names.index(name) for name in _wanted(file, all_names, columns)]
        raw.seek(0)
        reader = open_reader(raw, options=ipc.IpcReadOptions(included_fields=indices))
    except (ArrowException, OSError) as error:
        raise _damaged(file, 0, error) from error
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
    yield from _rows(file, _arrow_blocks(batches, raw), part=part, skip=skip)


def _arrow_blocks(batches: Iterable[Any], raw: BinaryIO) -> Iterator[_Block]:
    first_row = 0
    for batch in batches:
        slices = [batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS)]
        yield _Block(first_row=first_row, num_rows=batch.num_rows, read_bytes=raw.tell(), batches=slices)
        first_row += batch.num_rows


def _require_end(file: DataFile, raw: BinaryIO) -> None:
    """A stream cut off between two batches would look whole but for its end mark."""
    raw.seek(max(0, file.size_bytes - len(_STREAM_END)))
    if raw.read() != _STREAM_END:
        raise DataError(f"{file.location}: cut off (found no end mark of an Arrow stream); copy the file again")


def _wanted(file: DataFile, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    found = [name for name in columns if name in names]
    if not found:
        raise DataError(
            f"{file.location}: found columns {', '.join(map(repr, names)) or 'none'}; "
            f"expected {' or '.join(map(repr, columns))}; --text_field or --messages_field names the column"
        )
    return found


def _damaged(file: DataFile, row: int, error: Exception) -> DataError:
    return DataError(f"{file.location}: damaged or cut off after row {row} ({error}); copy the file again")


def _rows(file: DataFile, blocks: Iterable[_Block], *, part: Part, skip: int) -> Iterator[RawDocument]:
    """The rows of `blocks` that belong to `part`, without its first `skip`."""
    from pyarrow import ArrowException

    row = document = 0  # of the file, from 0; of the blocks' rows, from 0
    try:
        for block in blocks:
            row, next_document = block.first_row, document + block.num_rows
            if not _chosen(document, block.num_rows, part=part, skip=skip):
                document = next_document
                continue
            for batch in block.batches:
                offsets = _chosen(document, batch.num_rows, part=part, skip=skip)
                rows = batch.take(list(offsets)).to_pylist() if offsets else []
                for offset, content in zip(offsets, rows, strict=True):
                    yield RawDocument(
                        content=content,
                        location=file.location,
                        number=row + offset + 1,
                        ends_document=True,
                        read_bytes=block.read_bytes,
                    )
                row += batch.num_rows
                document += batch.num_rows
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, row, error) from error


def _chosen(document: int, num_documents: int, *, part: Part, skip: int) -> range:
    """Which of the documents from `document` on belong to `part`, as offsets."""
    first = max(part.index + skip * part.count, document + (part.index - document) % part.count)
    return range(first - document, num_documents, part.count)
