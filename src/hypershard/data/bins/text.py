"""Text as a data set: tokenised once into token bins kept in a cache folder, then read as those."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ...log import logger
from ...units import format_bytes
from ..encode.encoder import EncoderSpec
from ..records import DataFile
from .encoding_pool import num_cores
from .meta import FILES_VERSION, META_FILE, read_meta
from .prepare import SPLIT_SEED, log_progress, prepare


def prepare_text(
    files: Sequence[DataFile], cache_dir: Path, spec: EncoderSpec, *, val_share: float, malformed_rows: str
) -> Path:
    """The folder of token bins of these files, made in `cache_dir` by all cores if it is not there yet.

    Its name comes from the files' locations, sizes and versions, from `spec` and `val_share`: a changed file gives
    another folder. Where several processes want the same folder, one makes it and the others wait for it. A run that
    is stopped is gone on with by the next. Errors: see `prepare`; DataError: rows were left out when the folder was
    made, and `malformed_rows` is 'refuse'.
    """
    folder = cache_dir / _cache_key(files, spec, val_share)
    if not (folder / META_FILE).is_file():
        total_bytes = sum(file.size_bytes for file in files)
        logger.info(f"tokenising {len(files)} files, {format_bytes(total_bytes)}, into {folder}")
        try:
            prepare(
                files,
                folder,
                spec,
                val_share=val_share,
                seed=SPLIT_SEED,
                malformed_rows=malformed_rows,
                num_processes=num_cores(),
                progress=log_progress(),
            )
        except DataError:
            if not (folder / META_FILE).is_file():  # else another process was faster
                raise
    num_malformed_rows = read_meta(folder).num_malformed_rows
    if num_malformed_rows and malformed_rows == "refuse":
        raise DataError(
            f"--dataset: {num_malformed_rows} malformed rows were left out when it was tokenised; expected none "
            "(--malformed_rows=refuse); mend them, or accept that with --malformed_rows=skip"
        )
    return folder


def _cache_key(files: Sequence[DataFile], spec: EncoderSpec, val_share: float) -> str:
    described = [(file.location, file.size_bytes, file.version, file.split) for file in files]
    parts = (FILES_VERSION, described, spec.identity, val_share, SPLIT_SEED)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
