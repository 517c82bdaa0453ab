"""Text to token ids, with the `tokenizers` library alone: a tokenizer.json is all that is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError

# Names of the end-of-document token, tried in this order where tokenizer_config.json does not name one.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<|eot|>")
# Files beside tokenizer.json that transformers reads with it.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A loaded tokenizer. `vocab_size` is its largest id + 1 (ids may have gaps)."""

    path: Path  # of tokenizer.json
    sha256: str
    vocab_size: int
    eos_token_id: int
    backend: Any  # tokenizers.Tokenizer

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, nothing added; what looks like a special token in a text is encoded as text."""
        return [np.array(encoding.ids, dtype=np.int64) for encoding in self.encode_batch(texts)]

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """The library's own Encoding of each text, without offsets; otherwise as `encode`."""
        return self.backend.encode_batch_fast(list(texts), add_special_tokens=False)

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts that stand for one token which no plain text gives: ends of turns, headers, padding and the like."""
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)


def tokenizer_file(location: str | Path) -> Path:
    """The tokenizer.json meant by `location` (the file, or a folder that holds it). DataError when there is none."""
    path = Path(location).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        found = "a folder without tokenizer.json" if path.is_dir() else "nothing there"
        raise DataError(
            f"--tokenizer={location}: found {found}; "
            "expected a tokenizer.json or a folder that holds one, on a local disk"
        )
    return file


def kept_tokenizer(checkpoint_dir: Path) -> Path | None:
    """The tokenizer kept with checkpoints (in their folder, or in the run directory above it), if it is there."""
    for folder in (checkpoint_dir, checkpoint_dir.parent, checkpoint_dir.parent.parent):
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            return folder / "tokenizer"
    return None


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two tokenizer.json files give the same ids to the same tokens. DataError: one is no tokenizer."""
    vocabularies = [_backend(path).get_vocab(with_added_tokens=True) for path in (one, other)]
    return bool(vocabularies[0] == vocabularies[1])


def _backend(path: Path) -> Any:
    """The tokenizers library's object of a tokenizer.json. DataError when it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


def load_tokenizer(location: str | Path) -> TextTokenizer:
    """Load a tokenizer. DataError: no such file, not a tokenizer, or no end-of-document token known."""
    path = tokenizer_file(location)
    content = path.read_bytes()
    backend = _backend(path)
    # A tokenizer.json may carry the truncation and padding of the last use; both would change the data.
    backend.no_truncation()
    backend.no_padding()
    # "<|endoftext|>" inside a document is text; only our own end-of-document token ends documents.
    backend.encode_special_tokens = True
    return TextTokenizer(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=_eos_token_id(backend, path),
        backend=backend,
    )


def _eos_token_id(backend: Any, path: Path) -> int:
    named = _configured_eos(path.with_name("tokenizer_config.json"))
    if isinstance(named, int):
        return named
    if named is not None:
        token_id = backend.token_to_id(named)
        if token_id is None:
            config = path.with_name("tokenizer_config.json")
            raise DataError(f"--tokenizer: {config} names eos_token {named!r}, which {path} does not have")
        return int(token_id)
    for token in EOS_TOKENS:
        token_id = backend.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    raise DataError(
        f"--tokenizer: found no end-of-document token in {path}; "
        f"expected eos_token in a tokenizer_config.json beside it, or one of {', '.join(EOS_TOKENS)} in its vocabulary"
    )


def _configured_eos(path: Path) -> str | int | None:
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise DataError(f"--tokenizer: {path} is not readable as JSON: {error}") from error
    token = settings.get("eos_token")
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    if isinstance(token, str):
        return token
    token_id = settings.get("eos_token_id")
    return token_id if isinstance(token_id, int) else None
