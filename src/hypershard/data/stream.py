"""Documents tokenised while training, in an order that does not know how many ranks there are.

A stream has as many *lanes* as a step has sequences. Each lane owns parts of the files, reads them one after another,
shuffles `window` documents at a time, and cuts its documents, one after another, into rows. What comes next in a lane
follows from its `Cursor` alone, six numbers, so any process can go on with any lane.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..log import logger
from .encode.encoder import EncoderSpec
from .order import SampleOrder
from .read.documents import read_documents
from .records import DataFile, Encoder, Malformed, Part, RawDocument
from .rows import Row, row_of

# Documents tokenised in one call: enough to pay for the call, few enough that a lane soon has its first row.
_BATCH_DOCUMENTS = 32
_MOST_TOLD = 5  # malformed rows a lane names before it only counts


@dataclass(frozen=True)
class Cursor:
    """Where a lane stands, between two rows.

    samples: rows given so far. epoch: passes through the lane's parts so far. part, document: the place in the
    epoch's order of parts, and in that part, at which the block of shuffled documents begins. place: documents of the
    block that are used up; token: tokens of the next one that are.
    """

    samples: int = 0
    epoch: int = 0
    part: int = 0
    document: int = 0
    place: int = 0
    token: int = 0


CURSOR_NUMBERS = len(dataclasses.fields(Cursor))


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """A stream, as every process that reads lanes of it must know it. `val_share` of the documents, picked by a hash of
    their content, is left out, because it validates (0 where files are named so)."""

    name: str
    files: tuple[DataFile, ...]
    encoder: EncoderSpec
    seed: int
    window: int
    context_tokens: int
    document_mask: bool
    malformed_rows: str
    val_share: float


class Lane:
    """One lane of a stream with `num_lanes`, from `cursor` on. Raises DataError as reading does."""

    def __init__(self, spec: StreamSpec, encoder: Encoder, *, lane: int, num_lanes: int, cursor: Cursor):
        """`encoder` is the spec's, built once for all lanes of a process."""
        self._spec = spec
        self._encoder = encoder
        self._parts = lane_parts(spec.files, lane=lane, num_lanes=num_lanes)
        self._lane = lane
        self._order = SampleOrder(len(self._parts), seed=_number(spec.seed, lane))
        self._pending: deque[_Tokens] = deque()
        self._num_malformed = 0
        self._documents = self._tokenised(cursor)
        self.cursor = cursor
        self.documents: list[str] = []  # where the last row's tokens come from, for people

    def next(self) -> Row:
        """The lane's next row, full; `cursor` is then what follows it."""
        size = self._spec.context_tokens + 1
        while sum(document.num_left for document in self._pending) < size:
            self._pending.append(next(self._documents))
        row = self._row(size)
        self.documents = self._described(size)
        self._drop(size - 1)  # the last token is the first of the next row
        first = self._pending[0]
        self.cursor = dataclasses.replace(first.begin, samples=self.cursor.samples + 1, token=first.used)
        return row

    def _row(self, size: int) -> Row:
        tokens, targets, starts = [], [], []
        filled = 0
        for document in self._pending:
            count = min(document.num_left, size - filled)
            part = slice(document.used, document.used + count)
            starts.append(filled)
            tokens.append(document.tokens[part])
            targets.append(document.targets[part])
            filled += count
            if filled == size:
                break
        return row_of(
            np.concatenate(tokens),
            starts=np.array(starts),
            targets=np.concatenate(targets),
            document_mask=self._spec.document_mask,
        )

    def _described(self, size: int) -> list[str]:
        found = []
        for document in self._pending:
            found.append(f"{document.where} from token {document.used}" if document.used else document.where)
            size -= document.num_left
            if size <= 0:
                break
        return found

    def _drop(self, count: int) -> None:
        while count:
            first = self._pending[0]
            used = min(first.num_left, count)
            first.used += used
            count -= used
            if not first.num_left:
                self._pending.popleft()

    def _tokenised(self, cursor: Cursor) -> Iterator[_Tokens]:
        """The lane's documents that hold anything, for ever."""
        block = dataclasses.replace(cursor, samples=0, place=0, token=0)
        skip_places, skip_tokens = cursor.place, cursor.token
        while True:
            found = False
            for begin, documents in self._blocks(block):
                key = _number(self._spec.seed, self._lane, *dataclasses.astuple(begin))
                places = SampleOrder(len(documents), seed=key).samples(0, len(documents)).tolist()[skip_places:]
                for first in range(0, len(places), _BATCH_DOCUMENTS):
                    batch = places[first : first + _BATCH_DOCUMENTS]
                    encoded = self._encode([documents[place] for place in batch])
                    for offset, (tokens, targets) in enumerate(encoded):
                        used, skip_tokens = skip_tokens, 0
                        if len(tokens):
                            found = True
                            place = skip_places + first + offset
                            where = documents[places[first + offset]][0].where
                            yield _Tokens(dataclasses.replace(begin, place=place), where, tokens, targets, used)
                skip_places = 0
            if not found and block == Cursor(epoch=block.epoch):
                raise DataError(
                    f"--dataset={self._spec.name}: lane {self._lane} of the stream found no text in its "
                    f"{len(self._parts)} parts of files; the data hold fewer documents than a step has sequences, or "
                    f"none that can be read: set --streaming=0"
                )
            block = Cursor(epoch=block.epoch + 1)

    def _blocks(self, start: Cursor) -> Iterator[tuple[Cursor, list[list[RawDocument]]]]:
        """The rest of an epoch in blocks of `window` documents, each with the cursor of its beginning."""
        begin = start
        held: list[list[RawDocument]] = []
        for place, number, pieces in self._read(start):
            if not held:
                begin = Cursor(epoch=start.epoch, part=place, document=number)
            held.append(pieces)
            if len(held) == self._spec.window:
                yield begin, held
                held = []
        if held:
            yield begin, held

    def _read(self, start: Cursor) -> Iterator[tuple[int, int, list[RawDocument]]]:
        """Training documents from `start` on: place in the epoch's order of parts, number in the part, pieces."""
        order = self._order.samples(start.epoch * len(self._parts), len(self._parts)).tolist()
        for place in range(start.part, len(order)):
            file, part = self._parts[order[place]]
            number = start.document if place == start.part else 0
            pieces: list[RawDocument] = []
            for piece in read_documents(file, columns=self._spec.encoder.columns, part=part, skip=number):
                pieces.append(piece)
                if piece.ends_document:
                    if not validates(pieces[0], self._spec.val_share):
                        yield place, number, pieces
                    number, pieces = number + 1, []

    def _encode(self, documents: Sequence[list[RawDocument]]) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Tokens and targets of each document; none for a malformed one that is skipped."""
        results = iter(self._encoder.encode([piece for pieces in documents for piece in pieces]))
        joined = []
        for pieces in documents:
            tokens, targets = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=bool)]
            for _ in pieces:
                result = next(results)
                if isinstance(result, Malformed):
                    self._refuse_or_count(result)
                    continue
                tokens.append(result.tokens)
                targets.append(np.ones(len(result.tokens), dtype=bool) if result.targets is None else result.targets)
            joined.append((np.concatenate(tokens), np.concatenate(targets)))
        return joined

    def _refuse_or_count(self, row: Malformed) -> None:
        if self._spec.malformed_rows == "refuse":
            raise DataError(
                f"{row.where}: {row.reason}; mend or drop it, or set --malformed_rows=skip", shared_by_all_ranks=False
            )
        self._num_malformed += 1
        if self._num_malformed <= _MOST_TOLD:
            logger.warning(f"skipped {row.where}: {row.reason}")


@dataclass
class _Tokens:
    """A document in use: `begin` is the cursor of its beginning, `where` its file and line."""

    begin: Cursor
    where: str
    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    used: int

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.used


def lane_parts(files: Sequence[DataFile], *, lane: int, num_lanes: int) -> list[tuple[DataFile, Part]]:
    """The files, or the part of a file, that a lane reads: all lanes together read each document once."""
    num_files = len(files)
    if num_files >= num_lanes:
        return [(file, Part(index=0, count=1)) for file in files[lane::num_lanes]]
    file = lane % num_files
    num_sharing = len(range(file, num_lanes, num_files))
    return [(files[file], Part(index=lane // num_files, count=num_sharing))]


def validates(document: RawDocument, val_share: float) -> bool:
    """Whether a document of a stream without validation files is held out: a pure function of its content."""
    if not val_share:
        return False
    content = document.content
    digest = hashlib.blake2b(content if isinstance(content, bytes) else repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_share * 2**64


def _number(*key: int) -> int:
    """A seed of its own for each key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
