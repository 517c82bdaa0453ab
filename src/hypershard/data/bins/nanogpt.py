"""nanoGPT's folders of tokens, read as they are: train.bin and val.bin (uint16) and, for characters, a meta.pkl.

https://github.com/karpathy/nanoGPT: data/*/prepare.py write them. Without meta.pkl the ids are GPT-2's.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ...storage import readable_errors
from ..encode.tokenizer import load_tokenizer
from .meta import META_FILE, SPLITS
from .token_bins import STARTS_NAMES

PICKLE_FILE = "meta.pkl"
# GPT-2's BPE, as data/openwebtext/prepare.py and data/shakespeare/prepare.py use it through tiktoken.
GPT2_VOCAB_SIZE = 50257
GPT2_EOS_TOKEN_ID = 50256
_DTYPE = np.dtype("<u2")
# A meta.pkl holds two small tables of characters; nothing of this kind is larger.
_MOST_PICKLE_BYTES = 16 * 2**20
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 2**20


def is_nanogpt(folder: Path) -> bool:
    """Whether `folder` holds nanoGPT's files, and not token bins of this program that lost their meta.json."""
    has_ours = any((folder / name).exists() for name in (META_FILE, *STARTS_NAMES))
    return not has_ours and all((folder / f"{split}.bin").is_file() for split in SPLITS)


class NanoGPT:
    """One .bin file of nanoGPT's, memory-mapped; a `TokenSource`. Documents end with GPT-2's end token, if any."""

    def __init__(self, path: Path, *, vocab_size: int, eos_token_id: int | None, tokenizer_path: Path | None):
        """Open `path`. DataError: its size is odd, or it holds fewer than two tokens."""
        self._path = path
        self._vocab_size, self._eos_token_id, self._tokenizer_path = vocab_size, eos_token_id, tokenizer_path
        with readable_errors(path, "reading"):
            size_bytes = path.stat().st_size
        if size_bytes % _DTYPE.itemsize or size_bytes < 2 * _DTYPE.itemsize:
            raise DataError(
                f"--dataset={path.parent}: {path} has {size_bytes} bytes; expected an even number, 4 at least "
                "(uint16 tokens, as nanoGPT writes them); copy it again"
            )
        self._tokens: NDArray[Any] = np.asarray(np.memmap(path, dtype=_DTYPE, mode="r"))

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def document_starts(self) -> NDArray[np.int64] | None:
        """Not known without reading all of the file."""
        return None

    @property
    def eos_token_id(self) -> int | None:
        return self._eos_token_id

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the size, the vocabulary and 64 blocks of a MiB spread evenly over the file, the first and last included.

        The whole file would take half a minute at each start for OpenWebText's 17 GB. So a change between the blocks
        of a file larger than 64 MiB, of the same size, is not noticed.
        """
        content = memoryview(self._tokens.view(np.uint8))  # type: ignore[arg-type]
        digest = hashlib.sha256(repr((len(content), self._vocab_size, self._eos_token_id)).encode())
        if len(content) <= _SAMPLED_BLOCKS * _BLOCK_BYTES:
            digest.update(content)
        else:
            for block in range(_SAMPLED_BLOCKS):
                start = (len(content) - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1)
                digest.update(content[start : start + _BLOCK_BYTES])
        return digest.hexdigest()[:32]

    @property
    def tokenizer_path(self) -> Path | None:
        return self._tokenizer_path

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Token ids [count], copied. DataError when an id is not below `vocab_size`."""
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        tokens = self._tokens[start : start + count].astype(np.int64)
        if count and int(tokens.max()) >= self._vocab_size:
            where = int(tokens.argmax())
            raise DataError(
                f"--dataset={self._path.parent}: {self._path} holds id {tokens[where]} at token {start + where}; "
                f"expected ids below {self._vocab_size} (of {PICKLE_FILE}, or GPT-2's without one); the file is "
                f"damaged, or its {PICKLE_FILE} is missing or another one's",
                shared_by_all_ranks=False,
            )
        return tokens

    def targets(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """None: the loss counts every token."""
        del start, count
        return None

    def second_start(self, start: int, count: int) -> int | None:
        """None: its documents are no pairs."""
        del start, count
        return None


def open_nanogpt(folder: Path, tokenizer: str | None) -> tuple[NanoGPT, NanoGPT]:
    """The splits (train, val) of nanoGPT's `folder`; `tokenizer` may name the one it was made with, to be kept.

    DataError: damaged files, a meta.pkl with anything but plain values, or a tokenizer of another size.
    """
    pickle_path = folder / PICKLE_FILE
    has_pickle = pickle_path.is_file()
    vocab_size = _pickled_vocab_size(pickle_path) if has_pickle else GPT2_VOCAB_SIZE
    eos_token_id = None if has_pickle else GPT2_EOS_TOKEN_ID
    tokenizer_path = None
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        if given.vocab_size != vocab_size or (not has_pickle and given.eos_token_id != eos_token_id):
            raise DataError(
                f"--tokenizer={tokenizer}: found {given.vocab_size} ids, end token {given.eos_token_id}; "
                f"--dataset={folder} has {vocab_size}, end token {eos_token_id}; leave the flag out"
            )
        tokenizer_path = given.path
    train, val = (
        NanoGPT(
            folder / f"{split}.bin", vocab_size=vocab_size, eos_token_id=eos_token_id, tokenizer_path=tokenizer_path
        )
        for split in SPLITS
    )
    return train, val


class _PlainValues(pickle.Unpickler):
    """Builds dicts, lists, texts and numbers. A pickle that names any class or function is refused unread."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which could run code")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of it")


def _pickled_vocab_size(path: Path) -> int:
    """`vocab_size` of a meta.pkl. DataError: too large, damaged, or not the dict that nanoGPT writes."""
    expected = "expected a dict of vocab_size, stoi and itos, as nanoGPT's data/shakespeare_char/prepare.py writes it"
    with readable_errors(path, "reading"), open(path, "rb") as file:
        content = file.read(_MOST_PICKLE_BYTES + 1)
    if len(content) > _MOST_PICKLE_BYTES:
        raise DataError(f"{path}: found more than {_MOST_PICKLE_BYTES} bytes; {expected}")
    try:
        # Places in the unpickler's memory are allocated up to the highest number named.
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise pickle.UnpicklingError("it names more objects than it has bytes")
        value = _PlainValues(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not read: {error}; {expected}") from error
    vocab_size = value.get("vocab_size") if isinstance(value, dict) else None
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 0 < vocab_size <= 2**16:
        raise DataError(f"{path}: found vocab_size {vocab_size!r}; {expected}, 1 to 65536 ids")
    return vocab_size
