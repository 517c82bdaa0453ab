"""Documents as an analysis sees them: how long they are in tokens, and a hash of what they hold."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bins.encoding_pool import Batch, EncodedBatch, Place, encoded, read_batches
from ..bins.token_bins import COUNTED, dtype_for, numpy_dtype
from ..encode.encoder import EncoderSpec
from ..records import DataFile, Malformed, RawDocument
from ..source import TokenSource

# Of 10^10 documents two different ones then share a hash with a chance of about 10^-19.
DIGEST_BYTES = 16
# Tokens read at a time from token bins: some MB, however long a document is.
_READ_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A document: it stands at `place` `number`; `digest` is a hash of its token ids.

    So two documents are the same when the model sees the same, whatever else their rows hold. `num_target_tokens` are
    those that the loss counts. `read_bytes`: how far all of the input, as stored, has been read (0: not known).
    """

    place: str
    number: int
    num_tokens: int
    num_target_tokens: int
    digest: bytes
    read_bytes: int


def text_documents(
    files: Sequence[DataFile], spec: EncoderSpec, *, num_processes: int, limit: int | None
) -> Generator[Measured | Malformed, None, None]:
    """The documents of `files` in order, the first `limit` of them (None: all), tokenised in `num_processes`.

    Errors: as `read_documents` and `encoding_pool.encoded` raise.
    """
    before, size_bytes = {}, 0
    for file in files:
        before[file.location] = size_bytes
        size_bytes += file.size_bytes
    batches = _first(read_batches(files, spec.columns, place=Place()), limit)
    whole = _Whole()
    with contextlib.closing(encoded(batches, spec, num_processes=num_processes)) as results:
        for batch, result in results:
            refused = {row.where: row for row in result.malformed}
            for piece, tokens, num_targets in _pieces(batch, result):
                malformed = refused.get(piece.where) if not len(tokens) else None
                if malformed is not None:
                    yield malformed
                    whole = _Whole()
                    continue
                whole.add(tokens, num_targets, where=piece.where)
                if piece.ends_document:
                    yield whole.measured(before[piece.location] + piece.read_bytes)
                    whole = _Whole()


def _first(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    """The batches up to the end of document number `limit`."""
    num_left = limit
    for batch in batches:
        if num_left is None:
            yield batch
            continue
        ends = np.cumsum([document.ends_document for document in batch.documents])
        if ends[-1] < num_left:
            num_left -= int(ends[-1])
            yield batch
            continue
        count = int(np.searchsorted(ends, num_left)) + 1
        yield dataclasses.replace(batch, documents=batch.documents[:count], splits=batch.splits[:count])
        return


def _pieces(batch: Batch, result: EncodedBatch) -> Iterator[tuple[RawDocument, NDArray[Any], int]]:
    """Each piece of a batch, its tokens, and how many of them the loss counts."""
    ends = np.cumsum(result.lengths)
    counted = None if result.targets is None else np.concatenate(([0], np.cumsum(result.targets == COUNTED)))
    for piece, begin, end in zip(batch.documents, (ends - result.lengths).tolist(), ends.tolist(), strict=True):
        yield piece, result.tokens[begin:end], end - begin if counted is None else int(counted[end] - counted[begin])


class _Whole:
    """A document put together from its pieces."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._where = ""
        self._num_tokens = self._num_targets = 0

    def add(self, tokens: NDArray[Any], num_targets: int, *, where: str) -> None:
        self._where = self._where or where
        self._hash.update(tokens.tobytes())
        self._num_tokens += len(tokens)
        self._num_targets += num_targets

    def measured(self, read_bytes: int) -> Measured:
        place, _, number = self._where.rpartition(" ")
        return Measured(
            place=place,
            number=int(number),
            num_tokens=self._num_tokens,
            num_target_tokens=self._num_targets,
            digest=self._hash.digest(),
            read_bytes=read_bytes,
        )


def bins_documents(source: TokenSource, *, name: str, limit: int | None) -> Generator[Measured, None, None]:
    """The first `limit` documents of a split that is tokens already. DataError: damaged data.

    Where neither starts nor an end token say where documents end, all of it is one.
    """
    token_bytes = numpy_dtype(dtype_for(source.vocab_size)).itemsize
    for number, (start, end) in enumerate(_bounds(source)):
        if number == limit:
            return
        whole = _Whole()
        for first in range(start, end, _READ_TOKENS):
            count = min(_READ_TOKENS, end - first)
            targets = source.targets(first, count)
            num_targets = count if targets is None else int(targets.sum())
            whole.add(source.read(first, count), num_targets, where=f"{name} document {number}")
        yield whole.measured(end * token_bytes)


def _bounds(source: TokenSource) -> Iterator[tuple[int, int]]:
    """First token and end of each document."""
    start = 0
    if source.document_starts is not None:
        for first in range(1, len(source.document_starts), _READ_TOKENS):
            for end in source.document_starts[first : first + _READ_TOKENS].tolist():
                yield start, end
                start = end
    elif source.eos_token_id is not None:
        for first in range(0, source.num_tokens, _READ_TOKENS):
            tokens = source.read(first, min(_READ_TOKENS, source.num_tokens - first))
            for end in (np.flatnonzero(tokens == source.eos_token_id) + first + 1).tolist():
                yield start, end
                start = end
    if start < source.num_tokens:
        yield start, source.num_tokens
