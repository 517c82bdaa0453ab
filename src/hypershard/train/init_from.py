"""What --init_from names: weights, and the configuration and tokenizer that came with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.hf_folder import ModelFolder, local_copy, model_folder, read_model_folder
from ..config.schema import Config
from ..data.open import Dataset
from ..data.read.hub import HUB_NAME, list_model
from ..distributed.collectives import barrier, from_main
from ..distributed.process_group import World


@dataclass(frozen=True)
class Origin:
    """A model folder, wherever it lies; `local` holds its small files on this node."""

    folder: ModelFolder
    local: Path

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        file = self.local / "tokenizer.json"
        return file if file.is_file() else None


def tokenizer_of_run(config: Config, dataset: Dataset, origin: Origin | None) -> Path | None:
    """The tokenizer.json that the run keeps: that of its weights, unless another is named.

    The data's has the same ids (refuse.py), but in a cache the chat template beside it may be of another day.
    """
    if origin is not None and origin.tokenizer is not None and config.data.tokenizer is None:
        return origin.tokenizer
    return dataset.tokenizer_path


def find_model_folder(location: str, cache_dir: Path) -> ModelFolder:
    """The model folder at a path or s3:// URI; for what is neither, and could be a name, the hub is asked.

    Raises CheckpointError, DataError and StorageError as `read_model_folder` and `list_model` do.
    """
    looks_local = location.startswith((".", "/", "~")) or Path(location).exists()
    if looks_local or "/" not in location or not HUB_NAME.fullmatch(location):
        return read_model_folder(location)
    return model_folder(location, list_model(location, cache_dir=cache_dir))


def open_origin(config: Config, world: World) -> Origin | None:
    """Look at the folder of --init_from, rank 0 for all; None for 'scratch' and 'resume'. Reads no weights. Collective.

    Raises CheckpointError when no model is there, DataError and StorageError when a bucket refuses.
    """
    location = config.train.init_from
    if location in ("scratch", "resume"):
        return None
    # One rank asks: a bucket is listed once, and no two ranks can see different folders.
    cache_dir = Path(config.data.cache_dir).expanduser()
    folder: ModelFolder = from_main(find_model_folder(location, cache_dir) if world.ranks.is_main else None)
    if world.ranks.local_rank == 0:
        local_copy(folder, cache_dir)
    barrier()
    return Origin(folder, local_copy(folder, cache_dir))
