"""What the verbs that read checkpoints share: the tokenizer that lies beside them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.manifest import Place
from ..checkpoint.stores import DiskStore
from ..errors import StorageError
from ..storage import local_path

_FILES = ("tokenizer.json", "tokenizer_config.json")


@contextlib.contextmanager
def place_tokenizer(place: Place, given: str | None) -> Iterator[Path | None]:
    """The tokenizer `given` by a flag, else the one kept beside the checkpoints; None when there is none.

    From a bucket it is fetched into a folder that lives as long as the block.
    """
    from ..data.encode.tokenizer import kept_tokenizer

    if given is not None:
        yield local_path(given, flag="--tokenizer")
    elif isinstance(place.store, DiskStore):
        yield kept_tokenizer(place.store.directory)
    else:
        with tempfile.TemporaryDirectory(prefix="hypershard-") as folder:
            found = Path(folder)
            for name in _FILES:
                with contextlib.suppress(FileNotFoundError, StorageError):
                    (found / name).write_bytes(place.store.read("tokenizer", name))
            yield found if (found / _FILES[0]).exists() else None
