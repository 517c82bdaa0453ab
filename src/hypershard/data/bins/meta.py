"""meta.json of a folder of token bins: what is in it, sizes and checksums. No numpy, so that plans answer at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...storage import read_json
from ..kinds import CHAT, KINDS, TEXT

META_FILE = "meta.json"
FORMAT = "hypershard token bins"
FORMAT_VERSION = 3
# Version 2 did not name the kind, and knew no preferences; the files beside meta.json are the same since.
FILES_VERSION = 2
SPLITS = ("train", "val")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
MAKE_AGAIN = "make the folder again with `hypershard prepare` (or delete it, if it is one kept in --cache_dir)"


@dataclass(frozen=True, kw_only=True)
class FileMeta:
    """A file of the folder as it was written."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """One split: how much, and in which files. `targets` None: the loss counts every token."""

    num_tokens: int
    num_documents: int
    tokens: FileMeta
    starts: FileMeta
    targets: FileMeta | None

    @property
    def files(self) -> tuple[FileMeta, ...]:
        return (self.tokens, self.starts) if self.targets is None else (self.tokens, self.starts, self.targets)


@dataclass(frozen=True, kw_only=True)
class BinsMeta:
    """The content of meta.json. `encoding` names everything that decided the tokens (see `EncoderSpec.identity`)."""

    kind: str  # one of KINDS
    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_token_id: int | None
    tokenizer_file: str | None
    tokenizer_sha256: str | None
    encoding: str
    num_malformed_rows: int
    longest_document_tokens: int
    train: SplitMeta
    val: SplitMeta

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)


def read_meta(folder: Path) -> BinsMeta:
    """meta.json of `folder`, checked key by key. DataError: missing, damaged, or of a version not understood."""
    path = folder / META_FILE
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"--dataset={folder}: found no {META_FILE}; expected a folder of token bins; {MAKE_AGAIN}"
        ) from None
    except ValueError as error:
        raise DataError(f"--dataset={folder}: {path} is damaged ({error}); {MAKE_AGAIN}") from error
    found = value if isinstance(value, dict) else {}
    if found.get("format") == FORMAT and found.get("format_version") == FILES_VERSION:
        found = {**found, "format_version": FORMAT_VERSION, "kind": _unnamed_kind(found.get("train"))}
    if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"--dataset={folder}: {path} says format {found.get('format')!r}, format_version "
            f"{found.get('format_version')!r}; expected {FORMAT!r}, format_version {FORMAT_VERSION}; {MAKE_AGAIN}"
        )
    try:
        meta: BinsMeta = _typed(BinsMeta, found)
    except (KeyError, TypeError) as error:
        raise DataError(f"--dataset={folder}: {path} is incomplete or wrong at {error}; {MAKE_AGAIN}") from error
    if meta.dtype not in DTYPES:
        raise DataError(f"--dataset={folder}: {path} has dtype {meta.dtype!r}; expected one of {', '.join(DTYPES)}")
    has_targets = [getattr(meta, name).targets is not None for name in SPLITS]
    if meta.kind not in KINDS or has_targets != [meta.kind != TEXT] * len(SPLITS):
        raise DataError(
            f"--dataset={folder}: {path} has kind {meta.kind!r} and {sum(has_targets)} files of targets; expected one "
            f"of {', '.join(KINDS)}, with two of them, or none for {TEXT}; {MAKE_AGAIN}"
        )
    outside = [file.name for name in SPLITS for file in getattr(meta, name).files if Path(file.name).name != file.name]
    if outside:
        raise DataError(f"--dataset={folder}: {path} names {outside[0]!r}; expected a file beside it; {MAKE_AGAIN}")
    return meta


def _unnamed_kind(train: Any) -> str:
    """What the rows were, where meta.json does not say: only conversations had targets."""
    return CHAT if isinstance(train, dict) and train.get("targets") is not None else TEXT


_JSON_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}
_NESTED: dict[str, Any] = {"FileMeta": FileMeta, "FileMeta | None": FileMeta, "SplitMeta": SplitMeta}


def _typed(cls: Any, value: Any) -> Any:
    """Build the dataclass `cls` from `value`; KeyError or TypeError naming the key that is missing or wrong."""
    if not isinstance(value, dict):
        raise TypeError(f"found {value!r}, expected an object with the keys of {cls.__name__}")
    values = {}
    for field in dataclasses.fields(cls):
        item, type_name = value[field.name], str(field.type)
        if type_name in _NESTED and not (item is None and type_name.endswith("None")):
            item = _typed(_NESTED[type_name], item)
        elif type_name not in _NESTED and not isinstance(item, _JSON_TYPES[type_name]):
            raise TypeError(f"{field.name}: found {item!r}, expected {type_name}")
        values[field.name] = item
    return cls(**values)
