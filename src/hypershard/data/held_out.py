"""Validation tokens of a stream: the same few hundred documents on every rank and in every run, read once per node."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..log import logger
from ..storage import make_directory, write_bytes
from .encode.encoder import EncoderSpec
from .read.documents import read_documents
from .records import WHOLE, DataFile, Malformed, RawDocument
from .stream import validates

NUM_DOCUMENTS = (
    400  # some 300 thousand tokens of web text: a steady loss, and a minute's reading where 1 in 100 is kept
)
_MAX_READ = 100_000  # documents looked through for them


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where the documents come from: `val_share` of `files` by a hash of their content, or (0) all of them."""

    files: tuple[DataFile, ...]
    encoder: EncoderSpec
    val_share: float
    fingerprint: str


class HeldTokens:
    """Tokens in memory; a `TokenSource`."""

    document_starts: NDArray[np.int64] | None

    def __init__(self, tokens: NDArray[np.int64], starts: NDArray[np.int64], held: HeldOut):
        self._tokens = tokens
        self.document_starts = starts
        self.num_tokens = len(tokens)
        self.eos_token_id: int | None = held.encoder.eos_token_id
        self.vocab_size = held.encoder.vocab_size
        self.fingerprint = held.fingerprint
        self.tokenizer_path: Path | None = held.encoder.tokenizer_path

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        return self._tokens[start : start + count].astype(np.int64)

    def targets(self, start: int, count: int) -> NDArray[np.bool_] | None:
        return None

    def second_start(self, start: int, count: int) -> int | None:
        return None


def hold_out(held: HeldOut, cache_dir: Path, *, malformed_rows: str) -> HeldTokens:
    """The tokens, from `cache_dir` if another process or run has put them there. DataError: no document to hold out."""
    path = cache_dir / f"val-{held.fingerprint}.npz"
    if not path.is_file():
        logger.info(f"reading {NUM_DOCUMENTS} documents to validate on from {held.files[0].location}")
        tokens, starts = _collect(held, malformed_rows)
        content = io.BytesIO()
        np.savez(content, tokens=tokens.astype(np.uint32), starts=starts)
        make_directory(cache_dir)
        write_bytes(path, content.getvalue())
    with np.load(path, allow_pickle=False) as saved:
        return HeldTokens(saved["tokens"], saved["starts"], held)


def _collect(held: HeldOut, malformed_rows: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    encoder = held.encoder.build()
    documents: list[NDArray[np.int64]] = []
    for pieces in _documents(held):
        encoded = encoder.encode(pieces)
        for result in encoded:
            if isinstance(result, Malformed) and malformed_rows == "refuse":
                raise DataError(f"{result.where}: {result.reason}; mend or drop it, or set --malformed_rows=skip")
        tokens = [result.tokens for result in encoded if not isinstance(result, Malformed)]
        if sum(map(len, tokens)):
            documents.append(np.concatenate(tokens))
        if len(documents) == NUM_DOCUMENTS:
            break
    if sum(map(len, documents)) < 2:
        raise DataError(
            f"--dataset: found no document to validate on in {len(held.files)} files, such as "
            f"{held.files[0].location}; name some files val, or set --streaming=0"
        )
    lengths = [len(tokens) for tokens in documents]
    return np.concatenate(documents), np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def _documents(held: HeldOut) -> Iterator[list[RawDocument]]:
    num_read = 0
    for file in held.files:
        pieces: list[RawDocument] = []
        for piece in read_documents(file, columns=held.encoder.columns, part=WHOLE, skip=0):
            pieces.append(piece)
            if not piece.ends_document:
                continue
            if not held.val_share or validates(pieces[0], held.val_share):
                yield pieces
            pieces = []
            num_read += 1
            if num_read == _MAX_READ:
                return
