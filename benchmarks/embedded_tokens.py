"""The embedded corpus as one file of token ids, for peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_embedded_tokens(path: Path, count: int) -> Path:
    """`count` ids as uint16, from the corpus' beginning and over again as often as needed."""
    from hypershard.config.schema import DataConfig
    from hypershard.data.open import open_dataset

    source = open_dataset(DataConfig()).members[0].train
    np.resize(source.read(0, min(count, source.num_tokens)), count).astype(np.uint16).tofile(path)
    return path
