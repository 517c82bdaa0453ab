"""Documents -> a folder of token bins, in one pass, in bounded memory, whole or not at all.

Everything is written into a hidden neighbour of the output (`.NAME.partial`), meta.json last, and renamed when
complete. A journal in it says how far the bins can be trusted: the same command, run again, goes on from there, and
the folder it makes is the same, byte for byte, as if nothing had happened and whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, HypershardError
from ...log import logger
from ...storage import make_directory, readable_errors, write_json
from ...units import format_bytes, format_count
from ..encode.encoder import EncoderSpec
from ..encode.tokenizer import COMPANION_FILES
from ..kinds import PREFERENCE
from ..records import DataFile, Malformed
from .bins_writer import BinsWriter, Point, SplitCounts, SplitRule
from .encoding_pool import Place, encoded, read_batches
from .meta import FILES_VERSION, META_FILE, BinsMeta
from .token_bins import dtype_for, numpy_dtype
from .unfinished import Unfinished, locked

VAL_SHARE = 0.01
# Which documents validate must not change with the seed of a training run, so it has its own.
SPLIT_SEED = 0
# Starting a process takes about as long as tokenising this much.
BYTES_PER_PROCESS = 4 * 2**20
JOURNAL_SECONDS = 10.0
_MOST_TOLD = 5  # malformed rows that are logged before they are only counted


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
    files: Sequence[DataFile],
    output: Path,
    spec: EncoderSpec,
    *,
    val_share: float,
    seed: int,
    malformed_rows: str,
    num_processes: int,
    progress: Callable[[Progress], None] | None = None,
) -> BinsMeta:
    """Tokenise the documents of `files` into the new folder `output`: bins, meta.json, tokenizer.

    Where some files are named val, files keep their split; else a document goes to val where a hash of (`seed`, its
    index) falls below `val_share`. Where that picks none, val gets the last document, or the last `val_share` of the
    tokens if that document is long and no pair of answers: one .txt file works too. `malformed_rows`: 'refuse' the
    first, or 'skip' and count them. At most `num_processes` processes tokenise, fewer where there is little to do.
    While another process makes `output`, this one waits.

    DataError: unreadable documents, nothing in them, files that change meanwhile, or `output` holds something.
    StorageError: the disk refuses. HypershardError: a process was killed. After any of them, and after a kill, the
    same call goes on where the work ended, unless nothing of it can be used.
    """
    assert malformed_rows in ("refuse", "skip") and num_processes >= 1, (malformed_rows, num_processes)
    rule = SplitRule(val_share=val_share, seed=seed, has_val_files=any(file.split == "val" for file in files))
    if not rule.has_val_files and not 0 < val_share < 1:
        raise DataError(f"--val_share={val_share}: expected a share between 0 and 1, such as {VAL_SHARE}")
    _require_room(output)
    make_directory(output.parent)
    with locked(output):
        _require_room(output)
        unfinished = Unfinished(output, identity=_identity(files, spec, rule))
        work = _Work(files, spec, rule, unfinished, skips_malformed=malformed_rows == "skip")
        with contextlib.closing(work):
            work.read(num_processes=num_processes, progress=progress)
            meta = work.finish()
        unfinished.publish()
    return meta


def _require_room(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"--output={output}: found something there already; expected a new or empty folder")


def _identity(files: Sequence[DataFile], spec: EncoderSpec, rule: SplitRule) -> str:
    described = [(file.location, file.size_bytes, file.version, file.split) for file in files]
    parts = (FILES_VERSION, described, spec.identity, spec.vocab_size, rule.val_share, rule.seed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Work:
    """One `prepare`, from the first document, or the place an earlier one came to, to meta.json."""

    def __init__(
        self,
        files: Sequence[DataFile],
        spec: EncoderSpec,
        rule: SplitRule,
        unfinished: Unfinished,
        *,
        skips_malformed: bool,
    ):
        self._files, self._spec, self._rule, self._unfinished = files, spec, rule, unfinished
        self._skips_malformed = skips_malformed
        self._total_bytes = sum(file.size_bytes for file in files)
        self._writer = self._begun_or_new()
        self._note()

    def close(self) -> None:
        self._writer.close()

    def _begun_or_new(self) -> BinsWriter:
        """A writer that goes on where an earlier process came to, if that can be used."""
        point = None if self._unfinished.found is None else _point(self._unfinished.found)
        if point is not None and (self._skips_malformed or not point.num_malformed_rows):
            writer = self._new_writer()
            if writer.go_to(point):
                self._unfinished.take(dataclasses.asdict(point))
                logger.info(f"going on after {point.num_documents:,} documents, {point.num_tokens:,} tokens")
                return writer
            writer.close()
        if self._unfinished.found is not None:
            logger.warning(f"{self._unfinished.folder} cannot be used; starting again")
            self._unfinished.restart()
        self._unfinished.take(dataclasses.asdict(Point()))
        return self._new_writer()

    def _new_writer(self) -> BinsWriter:
        dtype = numpy_dtype(dtype_for(self._spec.vocab_size))
        return BinsWriter(self._unfinished.folder, dtype=dtype, has_targets=self._spec.has_targets, rule=self._rule)

    def _note(self) -> None:
        """Put everything written on the disk, then say so in the journal."""
        point = self._writer.point
        self._writer.sync()
        self._unfinished.note(dataclasses.asdict(point))

    def read(self, *, num_processes: int, progress: Callable[[Progress], None] | None) -> None:
        """Tokenise what is left of the files. After an error or an interrupt, what is done is kept."""
        try:
            self._read(num_processes, progress)
        except BaseException as error:  # an interrupt too: it may end hours of work
            self._keep()
            if self._writer.point.num_documents and isinstance(error, HypershardError):
                kept = f"{self._writer.point.num_documents:,} documents are done; the same command goes on from there"
                raise type(error)(f"{error} ({kept})", shared_by_all_ranks=error.shared_by_all_ranks) from error
            if isinstance(error, KeyboardInterrupt):
                logger.warning("interrupted; the same command goes on from here")
            raise
        if progress is not None:
            progress(self._progress(self._total_bytes))

    def _read(self, num_processes: int, progress: Callable[[Progress], None] | None) -> None:
        batches = read_batches(self._files, self._spec.columns, place=self._writer.point.place)
        num_processes = max(1, min(num_processes, self._total_bytes // BYTES_PER_PROCESS))
        noted_at = time.monotonic()
        with contextlib.closing(encoded(batches, self._spec, num_processes=num_processes)) as results:
            for batch, result in results:
                self._judge(result.malformed)
                self._writer.append(result, splits=batch.splits, place=batch.place)
                if progress is not None:
                    progress(self._progress(batch.read_bytes))
                if time.monotonic() - noted_at >= JOURNAL_SECONDS:
                    self._note()
                    noted_at = time.monotonic()

    def _progress(self, read_bytes: int) -> Progress:
        return Progress(
            read_bytes=read_bytes,
            total_bytes=self._total_bytes,
            num_documents=self._writer.point.num_documents,
            num_tokens=self._writer.num_tokens,
        )

    def _judge(self, malformed: Sequence[Malformed]) -> None:
        if malformed and not self._skips_malformed:
            first = malformed[0]
            raise DataError(
                f"{first.where}: {first.reason}; mend the row, or leave such rows out with --malformed_rows=skip"
            )
        num_told = self._writer.point.num_malformed_rows
        for row in malformed[: max(0, _MOST_TOLD - num_told)]:
            logger.warning(f"left out: {row.where}: {row.reason}")

    def _keep(self) -> None:
        """Make what is done usable for the next run, as far as the disk lets it; nothing done leaves nothing."""
        with contextlib.suppress(HypershardError):  # the error on its way says more
            if not self._writer.point.num_documents:
                self._unfinished.delete()
                return
            self._writer.truncate()  # which makes room for the journal on a full disk
            self._note()

    def finish(self) -> BinsMeta:
        """The validation split where none was picked, checksums, tokenizer, and last meta.json."""
        try:
            self._require_unchanged()
            self._require_tokens()
        except DataError:
            self._unfinished.delete()
            raise
        self._note()
        if self._writer.point.val.num_tokens < 2:
            self._writer.cut_val_from_train(self._rule.val_share, whole_documents=self._spec.kind == PREFERENCE)
            self._note()  # before the tokens that moved are cut off train
        splits = self._writer.finish()
        folder = self._unfinished.folder
        with readable_errors(folder, "copying the tokenizer into"):
            for name in ("tokenizer.json", *COMPANION_FILES):
                is_tokenizer = name == "tokenizer.json"
                source = self._spec.tokenizer_path if is_tokenizer else self._spec.tokenizer_path.with_name(name)
                if source.is_file():
                    shutil.copyfile(source, folder / name)
        meta = BinsMeta(
            kind=self._spec.kind,
            dtype=dtype_for(self._spec.vocab_size),
            vocab_size=self._spec.vocab_size,
            eos_token_id=self._spec.eos_token_id,
            tokenizer_file="tokenizer.json",
            tokenizer_sha256=self._spec.tokenizer_sha256,
            encoding=self._spec.identity,
            num_malformed_rows=self._writer.point.num_malformed_rows,
            longest_document_tokens=self._writer.longest_document_tokens(),
            train=splits["train"],
            val=splits["val"],
        )
        write_json(folder / META_FILE, meta.to_json())
        return meta

    def _require_unchanged(self) -> None:
        """Local files are as they were listed; remote ones are asked for in the version that was."""
        for file in self._files:
            if "://" in file.location:
                continue
            with readable_errors(Path(file.location), "reading"):
                status = Path(file.location).stat()
            if (status.st_size, str(status.st_mtime_ns)) != (file.size_bytes, file.version):
                raise DataError(
                    f"--dataset: {file.location} changed while it was read; start again when it is complete"
                )

    def _require_tokens(self) -> None:
        # Without val files, val is cut from train.
        needed = {"train": 2, "val": 2} if self._rule.has_val_files else {"train": 4}
        for name, num_tokens in needed.items():
            found = getattr(self._writer.point, name).num_tokens
            if found >= num_tokens:
                continue
            read = [file for file in self._files if not self._rule.has_val_files or (file.split or "train") == name]
            raise DataError(
                f"--dataset: found {found} tokens for '{name}' in {len(read)} files, such as {read[0].location}; "
                f"expected at least {num_tokens}: the text is empty or nearly so"
            )
        if self._spec.kind == PREFERENCE and not self._rule.has_val_files and self._writer.point.num_documents < 2:
            raise DataError(
                f"--dataset: found one pair of answers in {self._files[0].location}; expected at least two, to train "
                f"on and to validate on"
            )


def _point(value: Any) -> Point | None:
    """A point from a journal, None where it is not one."""
    try:
        return Point(
            place=Place(**value["place"]),
            train=SplitCounts(**value["train"]),
            val=SplitCounts(**value["val"]),
            num_malformed_rows=value["num_malformed_rows"],
        )
    except (TypeError, KeyError):
        return None
