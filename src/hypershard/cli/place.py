"""What the verbs that read checkpoints share: the tokenizer that lies beside them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.hf_folder import TOKENIZER_FILES
from ..checkpoint.manifest import Place
from ..checkpoint.stores import DiskStore
from ..errors import StorageError
from ..storage import local_path, make_directory


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
            for name in TOKENIZER_FILES:
                with contextlib.suppress(FileNotFoundError, StorageError):
                    content = place.store.read("tokenizer", name)
                    make_directory((found / name).parent)
                    (found / name).write_bytes(content)
            yield found if (found / TOKENIZER_FILES[0]).exists() else None
