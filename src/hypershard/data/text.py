"""Text as a data set: tokenised once into token bins kept in a cache folder, then read as those."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..log import logger
from .documents import TextFile, find_text_files
from .prepare import SPLIT_SEED, VAL_SHARE, log_progress, prepare
from .token_bins import FORMAT_VERSION, META_FILE
from .tokenizer import TextTokenizer


def prepare_text(
    inputs: Sequence[Path],
    cache_dir: Path,
    tokenizer: TextTokenizer,
    *,
    text_field: str,
    val_share: float = VAL_SHARE,
) -> Path:
    """The folder of token bins of these text files, made in `cache_dir` if it is not there yet.

    Its name comes from the files' names, sizes and times, the tokenizer, `text_field` and `val_share`: a changed
    file gives another folder. Call it on one process per node first and let the others wait, or all do the
    same work; that wastes time but harms nothing, since a folder appears whole. Errors: see `prepare`.
    """
    files = find_text_files(inputs)
    folder = cache_dir / _cache_key(inputs, files, tokenizer, text_field, val_share)
    if (folder / META_FILE).is_file():
        return folder
    total_bytes = sum(file.size_bytes for file in files)
    logger.info("tokenising %d files, %.1f MB, into %s", len(files), total_bytes / 1e6, folder)
    try:
        prepare(
            inputs,
            folder,
            tokenizer,
            text_field=text_field,
            val_share=val_share,
            seed=SPLIT_SEED,
            progress=log_progress(),
        )
    except DataError:
        if (folder / META_FILE).is_file():  # another node with the same cache_dir was faster
            return folder
        raise
    if find_text_files(inputs) != files:
        # The folder is named after files that no longer exist; a later run makes its own.
        raise DataError(f"--dataset: files in {', '.join(map(str, inputs))} changed while they were read; start again")
    return folder


def _cache_key(
    inputs: Sequence[Path], files: Sequence[TextFile], tokenizer: TextTokenizer, text_field: str, val_share: float
) -> str:
    described = [(str(file.path.resolve()), file.size_bytes, file.modified_ns, file.split) for file in files]
    parts = (FORMAT_VERSION, described, tokenizer.sha256, tokenizer.eos_token_id, text_field, val_share, SPLIT_SEED)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
