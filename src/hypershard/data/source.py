"""What a data format answers, and the pair of splits a run reads. No torch here: `prepare` and `plan` use it too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

KINDS_UNDERSTOOD = (
    "--dataset takes: 'embedded' (a small text corpus that needs no network); a folder of token bins made by "
    "`hypershard prepare`; or a .txt or .jsonl file (also .gz, .xz) or a folder of them"
)


class TokenSource(Protocol):
    """One split: a long row of token ids, documents one after another.

    `eos_token_id` ends each document (None: no boundaries known). `vocab_size` is the tokenizer's largest
    id + 1. `fingerprint` changes when the data change and not when they are copied or touched.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer_path(self) -> Path | None: ...

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Token ids [count] from `start` on; 0 <= start, start + count <= num_tokens. DataError: damaged data."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set opened for training: `train` and `val` come from one tokenizer."""

    train: TokenSource
    val: TokenSource
    folder: Path  # the token bins that are read
    tokenizer_path: Path | None
    vocab_size: int
    eos_token_id: int | None
