"""What a format of tokens answers. No torch here: `prepare` and `plan` use it too."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenSource(Protocol):
    """One split: a long row of token ids, documents one after another.

    `eos_token_id` ends each document (None: no boundaries known by it). `document_starts`: the first token of each
    document, ascending; None: only `eos_token_id` tells. `vocab_size` is the tokenizer's largest id + 1.
    `fingerprint` changes when the data change and not when they are copied or touched.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def document_starts(self) -> NDArray[np.int64] | None: ...
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

    def targets(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which of these tokens the loss counts when they are predicted; None: all, in the whole source."""
        ...

    def second_start(self, start: int, count: int) -> int | None:
        """Where in the document [start, start + count) the second of a pair of answers begins, counted from `start`.

        None: documents are no pairs. DataError: damaged data.
        """
        ...
