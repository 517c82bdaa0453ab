"""Reading a checkpoint's `.metadata` without trusting it, and its tensors into place.

torch.distributed.checkpoint stores the layout as a pickle, and unpickling runs whatever the file says. So
only the classes a layout is made of may appear; anything else is refused before it is called.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..errors import CheckpointError, DamagedCheckpoint
from .dcp_format import StoredFile, decode_saved, fill, places_of
from .manifest import METADATA, Manifest, StoredCheckpoint

_METADATA_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(dcp_metadata.__name__, name): getattr(dcp_metadata, name) for name in _METADATA_CLASSES},
    (dcp_filesystem.__name__, "_StorageInfo"): dcp_filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    # The directory it was saved to; only its text is kept. Python 3.13 moved the class.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
_NAMES_SHOWN = 3


class _Refused(Exception):
    """Why a layout is not accepted."""


class _LayoutUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _Refused(f"it names {module}.{name}, which no checkpoint needs; nothing in it was executed")


def read_metadata(stored: StoredCheckpoint, manifest: Manifest) -> Metadata:
    """The layout of a checkpoint.

    Raises DamagedCheckpoint when `.metadata` is not as saved, holds anything but a layout, or points outside the
    manifest's files.
    """
    where, content = stored.store.where(stored.folder, METADATA), stored.small_file(manifest, METADATA)
    try:
        metadata = _LayoutUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise _Refused(f"found {type(metadata).__name__}, expected a layout")
        _check_places(metadata, manifest.files)
    except _Refused as error:
        raise DamagedCheckpoint(f"{where} is refused: {error}") from None
    except Exception as error:  # a damaged pickle raises anything at all
        raise DamagedCheckpoint(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    return metadata


def _check_places(metadata: Metadata, files: Mapping[str, object]) -> None:
    for index, place in metadata.storage_data.items():
        if place.relative_path not in files:
            raise _Refused(f"{index.fqn} lies in {place.relative_path!r}, which the manifest does not list")
        if place.transform_descriptors:
            raise _Refused(f"{index.fqn} is stored as {place.transform_descriptors}, expected plain tensors")
    for name, stored in metadata.state_dict_metadata.items():
        for chunk in stored.chunks if isinstance(stored, TensorStorageMetadata) else ():
            if dcp_metadata.MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                raise _Refused(f"{name} from {tuple(chunk.offsets)} on was never written")


def check_same_model(location: str, metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly `tensors`: names, global shapes, dtypes.

    A checkpoint may hold more than what is asked for outside `model/` (its optimizer when only weights are read);
    more inside `model/` means other weights, never fewer of the same.
    """
    stored = metadata.state_dict_metadata
    wrong: list[str] = []
    for name, tensor in tensors.items():
        expected = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            wrong.append(f"{name}: found nothing, expected {expected}")
        elif entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            found = f"{tuple(entry.size)} {str(entry.properties.dtype).removeprefix('torch.')}"
            wrong.append(f"{name}: found {found}, expected {expected}")
        elif sum(math.prod(chunk.sizes) for chunk in entry.chunks) != tensor.numel():
            wrong.append(f"{name}: found only some of its rows, expected {expected}")
    for name in stored:
        if name.startswith("model/") and name not in tensors:
            wrong.append(f"{name}: found in the checkpoint, not in this model")
    if wrong:
        more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise CheckpointError(
            f"{location} is of another model: {'; '.join(wrong[:_NAMES_SHOWN])}{more}. "
            f"Give --model and its settings as in that run, or choose another --resume_from_checkpoint"
        )


def read_tensors(
    stored: StoredCheckpoint, manifest: Manifest, metadata: Metadata, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill `tensors` (plain, or DTensors of any sharding) in place; each rank reads and checks what it holds, alone.

    Raises DamagedCheckpoint or StorageError as `fill` does.
    """

    def read_file(name: str, use: Callable[[StoredFile], None]) -> None:
        try:
            use(StoredFile(stored.store.source(stored.folder, name), manifest.files[name]))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{stored.store.where(stored.folder, name)} is missing") from None

    fill(tensors, metadata, places_of(metadata), read_file, decode_saved)
