"""Text files -> a folder of token bins, in one pass, in bounded memory, whole or not at all.

Everything is written into a hidden neighbour of the output (`.NAME.HOST.PID.tmp`), meta.json last, and renamed
when complete. A killed run leaves only that neighbour; the next run on the same machine removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from ..log import logger
from ..storage import make_directory, readable_errors, remove_tree, sync_directory, write_json
from ..units import format_bytes, format_count
from .documents import Piece, TextFile, find_text_files, read_pieces
from .token_bins import META_FILE, SPLITS, BinsMeta, SplitMeta, dtype_for, file_sha256, numpy_dtype
from .tokenizer import COMPANION_FILES, TextTokenizer

VAL_SHARE = 0.01
# Which documents validate must not change with the seed of a training run, so it has its own.
SPLIT_SEED = 0
# Where the hash picks no document, the last one validates, unless it is a larger share of the tokens than this.
LARGEST_LAST_DOCUMENT = 0.1
MAX_WINDOW_TOKENS = 2**26
# One call of the tokenizer's own threads: enough to keep them busy, little enough to hold.
BATCH_PIECES = 1024
BATCH_CHARACTERS = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far `prepare` is; bytes are of the input files as they lie on disk (packed or not)."""

    read_bytes: int
    total_bytes: int
    num_documents: int
    num_tokens: int


def log_progress(*, every_seconds: float = 5.0) -> Callable[[Progress], None]:
    """A `progress` that writes a log line every few seconds, for where no terminal shows a bar."""
    written_at = time.monotonic()

    def show(done: Progress) -> None:
        nonlocal written_at
        if time.monotonic() - written_at >= every_seconds:
            written_at = time.monotonic()
            logger.info(
                f"tokenised {format_bytes(done.read_bytes)} of {format_bytes(done.total_bytes)}, "
                f"{format_count(done.num_documents)} documents, {format_count(done.num_tokens)} tokens"
            )

    return show


def prepare(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: TextTokenizer,
    *,
    text_field: str = "text",
    val_share: float = VAL_SHARE,
    seed: int = SPLIT_SEED,
    progress: Callable[[Progress], None] | None = None,
) -> BinsMeta:
    """Tokenise the text files of `inputs` into the new folder `output`: train.bin, val.bin, meta.json, tokenizer.

    Each document ends with the end-of-document token. Files named train or val keep their split; else a
    document goes to val where a hash of (`seed`, its index) falls below `val_share`. Where that picks none, val
    gets the last document, or the last `val_share` of the tokens if that document is long: one .txt file works too.
    DataError: unreadable text, nothing in it, or `output` holds something. StorageError: the disk refuses.
    """
    if not 0 < val_share < 1:
        raise DataError(f"--val_share={val_share}: expected a share between 0 and 1, such as {VAL_SHARE}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"--output={output}: found something there already; expected a new or empty folder")
    files = find_text_files(inputs)
    make_directory(output.parent)
    with _unfinished_neighbour(output) as folder:
        rule = _SplitRule(val_share=val_share, seed=seed, has_val_files=any(file.split == "val" for file in files))
        meta = _write_token_bins(files, folder, tokenizer, rule=rule, text_field=text_field, progress=progress)
        if not _publish(folder, output):
            raise DataError(f"--output={output}: something appeared there meanwhile; expected a new or empty folder")
    return meta


@contextlib.contextmanager
def _unfinished_neighbour(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, removed on the way out unless it was renamed."""
    here = process_space()
    for leftover in output.parent.glob(f".{output.name}.{here}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
            remove_tree(leftover)
    folder = output.parent / f".{output.name}.{here}.{os.getpid()}.tmp"
    remove_tree(folder)
    make_directory(folder)
    try:
        yield folder
    finally:
        remove_tree(folder)


def process_space() -> str:
    """What process numbers count in: a host, and a container on it, which may have the host's name."""
    return f"{socket.gethostname()}-{Path('/proc/self/ns/pid').stat().st_ino}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _publish(folder: Path, output: Path) -> bool:
    """Rename `folder` to `output`; False when something is there already (another node was faster)."""
    try:
        folder.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        with readable_errors(output, "writing"):
            raise
    sync_directory(output.parent)
    return True


@dataclass(frozen=True, kw_only=True)
class _SplitRule:
    """Which split a document belongs to: a pure function of its file's name or of its index."""

    val_share: float
    seed: int
    has_val_files: bool

    def split(self, file: TextFile, document: int) -> str:
        if self.has_val_files:
            return file.split or "train"
        digest = hashlib.blake2b(f"{self.seed} {document}".encode(), digest_size=8).digest()
        # Document 0 always trains, so that no choice of seed leaves nothing to train on.
        validates = document > 0 and int.from_bytes(digest, "little") < self.val_share * 2**64
        return "val" if validates else "train"


class _SplitFile:
    """A .bin file while it is written."""

    def __init__(self, path: Path, dtype: np.dtype[Any], file: IO[bytes]):
        self.path, self._dtype, self._file = path, dtype, file
        self.num_tokens = 0
        self.num_documents = 0

    def append(self, ids: Sequence[np.ndarray[Any, Any]], num_documents: int) -> None:
        if ids:
            tokens = np.concatenate(ids).astype(self._dtype)
            self._file.write(tokens.tobytes())
            self.num_tokens += len(tokens)
        self.num_documents += num_documents

    def tail(self, num_tokens: int) -> np.ndarray[Any, Any]:
        """The last `num_tokens` written."""
        self._file.flush()
        start_bytes = (self.num_tokens - num_tokens) * self._dtype.itemsize
        return np.fromfile(self.path, dtype=self._dtype, offset=start_bytes)

    def drop_tail(self, num_tokens: int) -> None:
        """Cut the last `num_tokens` off; nothing may be appended afterwards."""
        self.num_tokens -= num_tokens
        self._file.truncate(self.num_tokens * self._dtype.itemsize)

    def finish(self) -> SplitMeta:
        self._file.flush()
        os.fsync(self._file.fileno())
        return SplitMeta(
            file=self.path.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            size_bytes=self.path.stat().st_size,
            sha256=file_sha256(self.path),
        )


def _write_token_bins(
    files: Sequence[TextFile],
    folder: Path,
    tokenizer: TextTokenizer,
    *,
    rule: _SplitRule,
    text_field: str,
    progress: Callable[[Progress], None] | None,
) -> BinsMeta:
    """Write the bins and, last, meta.json into `folder`."""
    dtype_name = dtype_for(tokenizer.vocab_size)
    dtype = numpy_dtype(dtype_name)
    with readable_errors(folder, "writing token bins into"), contextlib.ExitStack() as stack:
        splits = {
            name: _SplitFile(folder / f"{name}.bin", dtype, stack.enter_context(open(folder / f"{name}.bin", "wb")))
            for name in SPLITS
        }
        done_bytes = 0
        for file in files:
            placed = _placed(file, read_pieces(file, text_field=text_field), rule=rule, splits=splits)
            for read_bytes in _encode(placed, splits, tokenizer):
                if progress is not None:
                    progress(_progress(files, done_bytes + read_bytes, splits))
            done_bytes += file.size_bytes
        _require_tokens(files, splits, rule.has_val_files)
        if splits["val"].num_tokens < 2:
            _cut_val_from_train(splits, val_share=rule.val_share, eos_token_id=tokenizer.eos_token_id)
        metas = {name: split.finish() for name, split in splits.items()}
        for name in ("tokenizer.json", *COMPANION_FILES):
            source = tokenizer.path if name == "tokenizer.json" else tokenizer.path.with_name(name)
            if source.is_file():
                shutil.copyfile(source, folder / name)
    meta = BinsMeta(
        dtype=dtype_name,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=tokenizer.sha256,
        train=metas["train"],
        val=metas["val"],
    )
    write_json(folder / META_FILE, meta.to_json())
    return meta


def _progress(files: Sequence[TextFile], read_bytes: int, splits: dict[str, _SplitFile]) -> Progress:
    return Progress(
        read_bytes=read_bytes,
        total_bytes=sum(file.size_bytes for file in files),
        num_documents=sum(split.num_documents for split in splits.values()),
        num_tokens=sum(split.num_tokens for split in splits.values()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """A piece and the split it goes to."""

    piece: Piece
    split: str


def _placed(
    file: TextFile, pieces: Iterator[Piece], *, rule: _SplitRule, splits: dict[str, _SplitFile]
) -> Iterator[_Placed]:
    # Every document so far has been written when a file begins, so the counts are the next document's index.
    document = sum(split.num_documents for split in splits.values())
    for piece in pieces:
        yield _Placed(piece=piece, split=rule.split(file, document))
        document += piece.ends_document


def _batches(placed: Iterator[_Placed]) -> Iterator[list[_Placed]]:
    batch: list[_Placed] = []
    num_characters = 0
    for item in placed:
        batch.append(item)
        num_characters += len(item.piece.text)
        if len(batch) >= BATCH_PIECES or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode(placed: Iterator[_Placed], splits: dict[str, _SplitFile], tokenizer: TextTokenizer) -> Iterator[int]:
    """Write the token ids; after each batch, the bytes of the file read so far."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int64)
    for batch in _batches(placed):
        encoded = tokenizer.encode([item.piece.text for item in batch])
        for name, split in splits.items():
            ids: list[np.ndarray[Any, Any]] = []
            num_documents = 0
            for item, tokens in zip(batch, encoded, strict=True):
                if item.split == name:
                    ids.append(tokens)
                    if item.piece.ends_document:
                        ids.append(eos)
                        num_documents += 1
            split.append(ids, num_documents)
        yield batch[-1].piece.read_bytes


def _require_tokens(files: Sequence[TextFile], splits: dict[str, _SplitFile], has_val_files: bool) -> None:
    needed = {"train": 2, "val": 2} if has_val_files else {"train": 4}  # without val files, val is cut from train
    for name, num_tokens in needed.items():
        if splits[name].num_tokens < num_tokens:
            read = [file.path for file in files if not has_val_files or file.split == name]
            raise DataError(
                f"--dataset: found {splits[name].num_tokens} tokens for '{name}' in {len(read)} files, "
                f"such as {read[0]}; expected at least {num_tokens}: the text is empty or nearly so"
            )


def _cut_val_from_train(splits: dict[str, _SplitFile], *, val_share: float, eos_token_id: int) -> None:
    """Move the end of train to val: the last document if it is short enough, else the last `val_share` of tokens."""
    train, val = splits["train"], splits["val"]
    num_tokens = min(max(2, math.ceil(train.num_tokens * val_share)), train.num_tokens - 2)
    # The last token ends the last document; an end before it, near enough, is where that document begins.
    window = train.tail(min(int(train.num_tokens * LARGEST_LAST_DOCUMENT), MAX_WINDOW_TOKENS))
    earlier_ends = np.flatnonzero(window[:-1] == eos_token_id)
    if earlier_ends.size:
        num_tokens = max(2, len(window) - 1 - int(earlier_ends[-1]))
    tail = train.tail(num_tokens)
    train.drop_tail(num_tokens)
    num_ends = int(np.count_nonzero(tail == eos_token_id))
    # A document cut in two counts on both sides.
    train.num_documents -= num_ends if earlier_ends.size else num_ends - 1
    val.append([tail], num_documents=num_ends)
