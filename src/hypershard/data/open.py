"""From the data section to an opened data set: what each name of `--dataset` means, and its train and val splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..config.schema import DataConfig
from ..errors import DataError
from ..log import logger
from .bins.meta import META_FILE, read_meta
from .bins.nanogpt import is_nanogpt, open_nanogpt
from .bins.prepare import VAL_SHARE
from .bins.text import prepare_text
from .bins.token_bins import TokenBins, open_token_bins
from .embedded import CORPUS_PATH, TOKENIZER_PATH
from .encode.encoder import EncoderSpec, encoder_spec, guess_kind
from .encode.preference_rows import CHOSEN_FIELD, PROMPT_FIELD, REJECTED_FIELD
from .encode.tokenizer import TextTokenizer, load_tokenizer
from .held_out import HeldOut, hold_out
from .kinds import CHAT, PREFERENCE, TEXT
from .mixture import parse_dataset
from .read.documents import read_documents
from .read.files import find_files
from .read.hub import fetch_tokenizer
from .records import WHOLE, DataFile
from .source import TokenSource

EMBEDDED = "embedded"
# 1% of the embedded corpus would be some twenty short sequences: too few for a steady validation loss.
EMBEDDED_VAL_SHARE = 0.05
_DEFAULTS = vars(DataConfig())
_TEXT_SETTINGS = (
    "dataset_config_name",
    "data_kind",
    "text_field",
    "messages_field",
    "chat_template",
    "malformed_rows",
    "streaming",
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Files to tokenise, and how: what a name of --dataset and the flags beside it mean together."""

    name: str
    files: tuple[DataFile, ...]
    encoder: EncoderSpec
    val_share: float  # of the documents, where no files are named so

    @property
    def fingerprint(self) -> str:
        """Changes with the files and with how they become tokens."""
        files = [(file.name, file.size_bytes, file.version, file.split) for file in self.files]
        return hashlib.sha256(repr((files, self.encoder.identity, self.val_share)).encode()).hexdigest()[:32]

    @property
    def held_share(self) -> float:
        """Share of the documents of a stream that validate; 0 where files are named so."""
        return 0.0 if any(file.split == "val" for file in self.files) else self.val_share

    def of_split(self, split: str) -> tuple[DataFile, ...]:
        """The files named so; all of them where none is named."""
        return tuple(file for file in self.files if file.split in (split, None))


@dataclass(frozen=True, kw_only=True)
class Member:
    """One data set of a mixture. `train` is tokens, or text that is tokenised while training."""

    name: str
    weight: Fraction | None
    train: TokenSource | Text
    val: TokenSource
    kind: str  # one of KINDS


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What --dataset names, opened for training: all members come from one tokenizer."""

    members: tuple[Member, ...]
    tokenizer_path: Path | None
    vocab_size: int
    eos_token_id: int | None

    @property
    def is_preference(self) -> bool:
        """Whether documents are pairs of answers: of all members or of none."""
        return self.members[0].kind == PREFERENCE

    @property
    def fingerprint(self) -> str:
        """Of the training data with their weights."""
        if len(self.members) == 1:
            return self.members[0].train.fingerprint
        parts = [(member.train.fingerprint, str(member.weight)) for member in self.members]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def val_fingerprint(self) -> str:
        return hashlib.sha256(repr([member.val.fingerprint for member in self.members]).encode()).hexdigest()[:32]


def open_dataset(data: DataConfig) -> Dataset:
    """Open what `data.dataset` names; text that is not streamed is tokenised first unless the cache holds it.

    With several processes on a node, open it in one of them first: the others find in the cache what that one made.
    DataError: unknown kind, missing, truncated or empty files, tokenizers that do not fit each other or the data,
    preferences beside other data.
    """
    members = tuple(_open_member(name, weight, data) for name, weight in _named(data))
    first = members[0].val
    for member in members[1:]:
        if (member.kind == PREFERENCE) != (members[0].kind == PREFERENCE):
            raise DataError(
                f"--dataset={data.dataset}: {members[0].name} is of kind {members[0].kind}, {member.name} of kind "
                f"{member.kind}; expected preferences (pairs of answers) in all of them or in none"
            )
        if (member.val.vocab_size, member.val.eos_token_id) != (first.vocab_size, first.eos_token_id):
            raise DataError(
                f"--dataset={data.dataset}: {member.name} was tokenised with {member.val.vocab_size} ids, "
                f"{members[0].name} with {first.vocab_size}; expected one tokenizer for all: give --tokenizer, and "
                f"prepare token bins again with it"
            )
    return Dataset(
        members=members,
        tokenizer_path=first.tokenizer_path,
        vocab_size=first.vocab_size,
        eos_token_id=first.eos_token_id,
    )


def with_tokenizer_of_model(data: DataConfig, tokenizer: Path) -> DataConfig:
    """`data` read with a model's own tokenizer.json, where no --tokenizer is given and not all of it is tokens already.

    A chat template beside it comes with it.
    """
    if data.tokenizer is not None or all(bins_folder(name) is not None for name, _ in _named(data)):
        return data
    return dataclasses.replace(data, tokenizer=str(tokenizer))


def _open_member(name: str, weight: Fraction | None, data: DataConfig) -> Member:
    folder = bins_folder(name)
    if folder is not None:
        train, val = open_bins(folder, data.tokenizer)
        kind = train.kind if isinstance(train, TokenBins) else TEXT
        _refuse_settings_of_text(name, data, kind=kind)
        return Member(name=name, weight=weight, train=train, val=val, kind=kind)
    text = resolve_text(name, data)
    if _is_streamed(text, data):
        held = hold_out(_held_out(text), _cache_dir(data), malformed_rows=data.malformed_rows)
        return Member(name=name, weight=weight, train=text, val=held, kind=text.encoder.kind)
    bins = prepare_text(
        text.files, _cache_dir(data), text.encoder, val_share=text.val_share, malformed_rows=data.malformed_rows
    )
    train, val = open_token_bins(bins)
    return Member(name=name, weight=weight, train=train, val=val, kind=text.encoder.kind)


def _refuse_settings_of_text(name: str, data: DataConfig, *, kind: str) -> None:
    """Raises DataError for a setting that says how text becomes tokens, where every name means tokens of a `kind`."""
    if len(_named(data)) > 1:  # another of them may be text
        return
    for setting in _TEXT_SETTINGS:
        true_anyway = {"data_kind": kind, "streaming": False}.get(setting)
        if getattr(data, setting) not in (_DEFAULTS[setting], true_anyway):
            raise DataError(
                f"--{setting}={getattr(data, setting)}: --dataset={name} holds tokens already (of {kind}), which this "
                f"cannot change; drop the flag"
            )


def _named(data: DataConfig) -> list[tuple[str, Fraction | None]]:
    return [(data.dataset, None)] if Path(data.dataset).exists() else parse_dataset(data.dataset)


def resolve_text(name: str, data: DataConfig) -> Text:
    """The files behind `name` and their encoder. The tokenizer: as given, else the data's own, else the embedded one.

    DataError: nothing there, a kind not understood, no usable tokenizer or chat template, --text_field given for
    conversations, or a field's name for preferences, whose keys are fixed.
    """
    if name == EMBEDDED:
        files = find_files(str(CORPUS_PATH), dataset_config_name=None, cache_dir=_cache_dir(data))
    else:
        files = find_files(name, dataset_config_name=data.dataset_config_name, cache_dir=_cache_dir(data))
    own = Path(name).expanduser() / "tokenizer.json"
    default = own if own.is_file() else TOKENIZER_PATH
    if data.tokenizer is None and default == TOKENIZER_PATH and name != EMBEDDED:
        _tell_of_embedded_tokenizer()
    tokenizer = _tokenizer(data, default)
    kind = data.data_kind if data.data_kind != "auto" else _kind(files, data)
    if kind == CHAT:
        _refuse_text_field(name, data)
    elif kind == PREFERENCE:
        _refuse_fields(name, data)
    encoder = encoder_spec(
        kind=kind,
        tokenizer=tokenizer,
        text_field="text" if name == EMBEDDED else data.text_field,
        messages_field=data.messages_field,
        chat_template=None if data.chat_template is None else Path(data.chat_template).expanduser(),
    )
    val_share = EMBEDDED_VAL_SHARE if name == EMBEDDED else VAL_SHARE
    return Text(name=name, files=tuple(files), encoder=encoder, val_share=val_share)


def _refuse_text_field(name: str, data: DataConfig) -> None:
    """Raises DataError for --text_field, where all that is read is conversations."""
    if data.text_field != _DEFAULTS["text_field"] and len(_named(data)) == 1:
        raise DataError(
            f"--text_field={data.text_field}: --dataset={name} holds conversations, which are read from "
            f"--messages_field={data.messages_field}; drop the flag, or set --data_kind=text to read that field as "
            f"plain text"
        )


def _refuse_fields(name: str, data: DataConfig) -> None:
    """Raises DataError for settings that name a key, where the keys have fixed names."""
    for setting in ("text_field", "messages_field"):
        if getattr(data, setting) != _DEFAULTS[setting]:
            raise DataError(
                f"--{setting}={getattr(data, setting)}: --dataset={name} holds preferences, which are read from "
                f"{PROMPT_FIELD}, {CHOSEN_FIELD} and {REJECTED_FIELD}; drop the flag, or set --data_kind"
            )


def _kind(files: list[DataFile], data: DataConfig) -> str:
    """What the first document says."""
    columns = (data.text_field, data.messages_field, CHOSEN_FIELD, REJECTED_FIELD)
    for file in files:
        for document in read_documents(file, columns=columns, part=WHOLE, skip=0):
            return guess_kind(document, text_field=data.text_field, messages_field=data.messages_field)
    return TEXT


def _is_streamed(text: Text, data: DataConfig) -> bool:
    if text.encoder.has_targets:
        if data.streaming:
            raise DataError(
                "--streaming=1: conversations and pairs are packed whole, which needs them all; drop the flag"
            )
        return False
    return any("://" in file.location for file in text.files) if data.streaming is None else data.streaming


def _held_out(text: Text) -> HeldOut:
    return HeldOut(
        files=text.of_split("val"), encoder=text.encoder, val_share=text.held_share, fingerprint=text.fingerprint
    )


def _tokenizer(data: DataConfig, default: Path) -> TextTokenizer:
    """--tokenizer: a local file or folder, else the name of a model on a hub."""
    location = data.tokenizer
    if location is None:
        return load_tokenizer(default)
    looks_local = location.startswith((".", "/", "~")) or location.endswith(".json")
    if looks_local or Path(location).expanduser().exists():
        return load_tokenizer(location)
    return load_tokenizer(fetch_tokenizer(location, cache_dir=_cache_dir(data)))


@functools.cache  # once a process
def _tell_of_embedded_tokenizer() -> None:
    logger.info("no --tokenizer given: the embedded one of 4,096 ids is used, which is for trials")


def _cache_dir(data: DataConfig) -> Path:
    return Path(data.cache_dir).expanduser()


def bins_folder(name: str) -> Path | None:
    """The folder, if `name` means one that is or once was a folder of tokens."""
    if name == EMBEDDED or "://" in name:
        return None
    path = Path(name).expanduser()
    if path.name == META_FILE:
        path = path.parent
    looks_so = path.is_dir() and ((path / META_FILE).is_file() or any(path.glob("*.bin")))
    return path if looks_so else None


def open_bins(folder: Path, tokenizer: str | None) -> tuple[TokenSource, TokenSource]:
    """Token bins or nanoGPT's files. They are tokenised already: `tokenizer` can only agree with them. DataError."""
    if is_nanogpt(folder):
        return open_nanogpt(folder, tokenizer)
    if tokenizer is not None and load_tokenizer(tokenizer).sha256 != read_meta(folder).tokenizer_sha256:
        raise DataError(
            f"--tokenizer={tokenizer}: --dataset={folder} was tokenised with another tokenizer; leave the flag out, "
            f"or make the bins again with `hypershard prepare TEXT --output DIR --tokenizer {tokenizer}`"
        )
    return open_token_bins(folder)
