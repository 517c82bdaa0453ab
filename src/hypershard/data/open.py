"""From the data section to an opened data set: which kind `--dataset` means, and its train and val splits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import DataConfig
from ..errors import DataError
from .documents import is_text_file
from .embedded import CORPUS_PATH, TOKENIZER_PATH
from .prepare import VAL_SHARE
from .source import KINDS_UNDERSTOOD, Dataset
from .text import prepare_text
from .token_bins import META_FILE, open_token_bins, read_meta
from .tokenizer import TextTokenizer, load_tokenizer

EMBEDDED = "embedded"
# 1% of the embedded corpus would be some twenty short sequences: too few for a steady validation loss.
EMBEDDED_VAL_SHARE = 0.05
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """Text to tokenise: what `--dataset`, `--tokenizer` and `--text_field` mean together."""

    inputs: tuple[Path, ...]
    tokenizer: TextTokenizer
    text_field: str
    val_share: float


def open_dataset(data: DataConfig) -> Dataset:
    """Open what `data.dataset` names; text is tokenised first unless the cache holds it.

    With several processes on a node call `prepare_dataset` on one of them first and wait for it.
    DataError: unknown kind, missing, truncated or empty files, a tokenizer that does not fit.
    """
    folder = prepare_dataset(data)
    train, val = open_token_bins(folder)
    return Dataset(
        train=train,
        val=val,
        folder=folder,
        tokenizer_path=train.tokenizer_path,
        vocab_size=train.vocab_size,
        eos_token_id=train.eos_token_id,
    )


def prepare_dataset(data: DataConfig) -> Path:
    """The folder of token bins behind `data.dataset`, made in `data.cache_dir` first if it is text.

    Errors: see `open_dataset`.
    """
    folder = _bins_folder(data.dataset)
    if folder is not None:
        _require_same_tokenizer(folder, data.tokenizer)
        return folder
    text = resolve_text(data.dataset, tokenizer=data.tokenizer, text_field=data.text_field)
    cache_dir = Path(data.cache_dir).expanduser()
    return prepare_text(text.inputs, cache_dir, text.tokenizer, text_field=text.text_field, val_share=text.val_share)


def resolve_text(dataset: str, *, tokenizer: str | None, text_field: str) -> TextInput:
    """The text behind `dataset`. The tokenizer: as given, else the data set's own, else the embedded one.

    DataError: nothing there, a kind not understood, or no usable tokenizer.
    """
    if dataset == EMBEDDED:
        return TextInput(
            inputs=(CORPUS_PATH,),
            tokenizer=load_tokenizer(tokenizer or TOKENIZER_PATH),
            text_field="text",
            val_share=EMBEDDED_VAL_SHARE,
        )
    path = _existing(dataset)
    if path.is_file() and not is_text_file(path):
        raise DataError(f"--dataset={dataset}: found a {path.suffix or 'nameless'} file; {KINDS_UNDERSTOOD}")
    own = path / "tokenizer.json"
    default = own if own.is_file() else TOKENIZER_PATH
    return TextInput(
        inputs=(path,), tokenizer=load_tokenizer(tokenizer or default), text_field=text_field, val_share=VAL_SHARE
    )


def _bins_folder(dataset: str) -> Path | None:
    """The folder, if `dataset` names one that is or once was a folder of token bins."""
    if dataset == EMBEDDED:
        return None
    path = _existing(dataset)
    if path.name == META_FILE:
        path = path.parent
    looks_so = path.is_dir() and ((path / META_FILE).is_file() or any(path.glob("*.bin")))
    return path if looks_so else None


def _existing(dataset: str) -> Path:
    if "://" in dataset:
        raise DataError(f"--dataset={dataset}: found a {dataset.split('://', 1)[0]}:// URI; {KINDS_UNDERSTOOD}")
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if _HUB_NAME.fullmatch(dataset):
        raise DataError(
            f"--dataset={dataset}: no such path, and names of hub data sets are not understood "
            f"(nothing is downloaded); save it as .jsonl first; {KINDS_UNDERSTOOD}"
        )
    raise DataError(f"--dataset={dataset}: found nothing there; {KINDS_UNDERSTOOD}")


def _require_same_tokenizer(folder: Path, tokenizer: str | None) -> None:
    """Token bins are tokenised already: --tokenizer can only agree with them."""
    if tokenizer is None:
        return
    given = load_tokenizer(tokenizer)
    if given.sha256 != read_meta(folder).tokenizer_sha256:
        raise DataError(
            f"--tokenizer={tokenizer}: --dataset={folder} was tokenised with another tokenizer; leave the flag out, "
            f"or make the bins again with `hypershard prepare TEXT --output DIR --tokenizer {tokenizer}`"
        )
