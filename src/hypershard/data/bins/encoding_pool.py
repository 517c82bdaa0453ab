"""Documents -> arrays of tokens, batch by batch and in order, here or in several processes.

One process reads; what it reads does not depend on who encodes it, so neither do the tokens. A worker has a tokenizer
of its own with one thread: the tokenizer's own threads would wait for one another and for Python between batches.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import HypershardError
from ..encode.encoder import EncoderSpec
from ..read.documents import read_documents
from ..records import WHOLE, DataFile, Encoded, Encoder, Malformed, RawDocument
from .token_bins import SECOND_START, TARGETS_DTYPE, dtype_for, numpy_dtype

# Text for about a second of one core: much more than it takes to hand it over, little enough to hold many.
BATCH_DOCUMENTS = 4096
BATCH_BYTES = 2**20
# Batches read ahead for each worker: one it encodes, one that waits for it, one that waits to be written.
BATCHES_AHEAD = 3
# Launchers and Ctrl-C send these to whole process groups; the process that reads decides what happens then.
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where reading stands: the first `num_documents` documents of file `file_index` have been read, none after."""

    file_index: int = 0
    num_documents: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Documents, or pieces of them, that follow one another in the files."""

    documents: list[RawDocument]
    splits: list[str | None]  # of each one's file
    place: Place  # after the last document that ends here
    read_bytes: int  # of all files, as stored


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """The tokens of a batch, one piece after another: `lengths` [pieces] says how many are whose.

    `targets` [tokens] as token bins hold them, or None where the loss counts every token. A malformed piece has none.
    """

    tokens: NDArray[Any]
    targets: NDArray[np.uint8] | None
    lengths: NDArray[np.int64]
    ends: NDArray[np.bool_]  # [pieces]: it ends a document
    malformed: list[Malformed]


def num_cores() -> int:
    """How many this process may use, which a job's limits may make fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def read_batches(files: Sequence[DataFile], columns: Sequence[str], *, place: Place) -> Iterator[Batch]:
    """What comes after `place`. Errors: see `read_documents`."""
    documents: list[RawDocument] = []
    splits: list[str | None] = []
    size_bytes = 0
    done_bytes = sum(file.size_bytes for file in files[: place.file_index])
    for index, file in enumerate(files[place.file_index :], start=place.file_index):
        skip = place.num_documents if index == place.file_index else 0
        num_documents = skip
        for document in read_documents(file, columns=columns, part=WHOLE, skip=skip):
            documents.append(document)
            splits.append(file.split)
            size_bytes += _size(document.content)
            if document.ends_document:
                num_documents += 1
                place = Place(file_index=index, num_documents=num_documents)
            if len(documents) >= BATCH_DOCUMENTS or size_bytes >= BATCH_BYTES:
                read_bytes = done_bytes + document.read_bytes
                yield Batch(documents=documents, splits=splits, place=place, read_bytes=read_bytes)
                documents, splits, size_bytes = [], [], 0
        done_bytes += file.size_bytes
    if documents:
        yield Batch(documents=documents, splits=splits, place=place, read_bytes=done_bytes)


def _size(content: Any) -> int:
    """About the bytes of text in a document."""
    if isinstance(content, bytes | str):
        return len(content)
    if isinstance(content, Mapping):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, list | tuple) else 8


def encoded(
    batches: Iterator[Batch], spec: EncoderSpec, *, num_processes: int
) -> Generator[tuple[Batch, EncodedBatch]]:
    """Each batch with its tokens, in order. One process: this one, and the tokenizer's threads.

    HypershardError: a process was killed. Whatever reading and encoding raise, too.
    """
    if num_processes == 1:
        encoder = spec.build()
        for batch in batches:
            yield batch, _encode(encoder, batch.documents, spec)
        return
    # Not forked: the caller may have threads (a tokenizer's, torch's), whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker)
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            with _signals_held_back():  # a worker is started here when all are busy
                future = pool.submit(_encode_in_worker, spec, _packed(batch.documents))
            waiting.append((batch, future))
            if len(waiting) == BATCHES_AHEAD * num_processes:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool as error:
        raise HypershardError(
            f"one of the {num_processes} processes that tokenise was killed, mostly for lack of memory; fewer of them "
            "(--num_processes) need less",
            shared_by_all_ranks=False,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# (contents, locations, numbers, ends): lists of plain values are pickled several times faster than dataclasses.
_Packed = tuple[list[Any], list[str], list[int], list[bool]]


def _packed(documents: list[RawDocument]) -> _Packed:
    return (
        [document.content for document in documents],
        [document.location for document in documents],
        [document.number for document in documents],
        [document.ends_document for document in documents],
    )


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process begins with the mask of the thread that starts it, so that none of these reaches a worker, ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker does not notice that its parent was killed: it holds the other end of the queue itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _encoder(spec: EncoderSpec) -> Encoder:
    return spec.build()


def _encode_in_worker(spec: EncoderSpec, packed: _Packed) -> EncodedBatch:
    documents = [
        RawDocument(content=content, location=location, number=number, ends_document=ends, read_bytes=0)
        for content, location, number, ends in zip(*packed, strict=True)
    ]
    return _encode(_encoder(spec), documents, spec)


def _encode(encoder: Encoder, documents: list[RawDocument], spec: EncoderSpec) -> EncodedBatch:
    tokens: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.uint8]] = []
    lengths = np.zeros(len(documents), dtype=np.int64)
    malformed = []
    for index, result in enumerate(encoder.encode(documents)):
        if isinstance(result, Malformed):
            malformed.append(result)
            continue
        lengths[index] = len(result.tokens)
        tokens.append(result.tokens)
        if spec.has_targets:
            targets.append(_targets(result))
    return EncodedBatch(
        tokens=_joined(tokens, numpy_dtype(dtype_for(spec.vocab_size))),
        targets=_joined(targets, TARGETS_DTYPE) if spec.has_targets else None,
        lengths=lengths,
        ends=np.array([document.ends_document for document in documents], dtype=np.bool_),
        malformed=malformed,
    )


def _targets(encoded: Encoded) -> NDArray[np.uint8]:
    """As token bins hold them."""
    if encoded.targets is None:
        return np.ones(len(encoded.tokens), dtype=np.uint8)
    targets = encoded.targets.astype(np.uint8)
    if encoded.second_start is not None:
        targets[encoded.second_start] = SECOND_START
    return targets


def _joined(arrays: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype=dtype)
