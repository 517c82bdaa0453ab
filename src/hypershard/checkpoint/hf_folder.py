"""What a model folder of Hugging Face's layout holds, wherever it lies, and where in it each tensor's bytes are.

A safetensors file is 8 bytes (the header's length, little endian), the header (JSON: name -> dtype, shape and the range
of bytes, counted from the header's end) and the tensors' bytes, the last dimension running fastest
(https://github.com/huggingface/safetensors#format). So with the headers any box of any tensor can be read by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..remote_files import Patience, RemoteFile, list_files, open_ranges
from ..s3 import S3Uri
from ..storage import local_path, make_directory, write_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# What goes with a model's texts wherever it goes; how it ends a text is told in ids of its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    GENERATION_CONFIG,
)
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library itself takes
_READS_AT_ONCE = 8
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of the folder: its first byte in that file, its dtype as safetensors spells it, its shape."""

    file: str
    begin: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder's table of contents. Values may be sent to other ranks, so that one of them lists for all.

    `location` is as the user gave it; `files` are by name, `tensors` by the names they are stored under.
    """

    location: str
    files: Mapping[str, RemoteFile]
    tensors: Mapping[str, StoredTensor]

    @property
    def is_remote(self) -> bool:
        return any("://" in file.location for file in self.files.values())

    def read_small(self, name: str, *, patience: Patience | None = None) -> bytes:
        """The whole content of one of `files`. Raises DataError, StorageError and OSError as `open_ranges` does."""
        return _content(self.files[name], patience)


def read_model_folder(location: str, *, patience: Patience | None = None) -> ModelFolder:
    """Look at the safetensors model in a folder: a path or s3://bucket/prefix. Reads headers, no weights.

    Raises CheckpointError when there is none or a file is damaged, StorageError when a bucket does not answer.
    """
    with _readable(f"--init_from={location}"):
        files = _listing(location, patience)
    return model_folder(location, files, patience=patience)


def model_folder(location: str, files: Mapping[str, RemoteFile], *, patience: Patience | None = None) -> ModelFolder:
    """The same of `files` that were listed already, by their names relative to the folder."""
    with _readable(f"--init_from={location}"):
        names = _weight_files(location, files, patience)
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            tables = pool.map(lambda name: _table(name, files[name], patience), sorted(set(names.values())))
            tensors = {name: entry for table in tables for name, entry in table.items()}
    lost = sorted(name for name in names if name and name not in tensors)
    if lost:
        raise CheckpointError(
            f"--init_from={location}: {INDEX} names {', '.join(lost[:_NAMES_SHOWN])}, which {names[lost[0]]} lacks"
        )
    return ModelFolder(location, files, tensors)


def local_copy(folder: ModelFolder, cache_dir: Path) -> Path:
    """A local folder with the configuration and tokenizer of `folder`: itself, or a copy in the cache.

    One process of a node at a time. Raises DataError and StorageError when the files cannot be fetched.
    """
    if not folder.is_remote:
        return local_path(folder.location, flag="--init_from")
    small = {name: folder.files[name] for name in (CONFIG, *TOKENIZER_FILES) if name in folder.files}
    versions = repr(sorted((file.location, file.size_bytes, file.version) for file in small.values()))
    kept = cache_dir / "weights" / hashlib.sha256(versions.encode()).hexdigest()[:32]
    for name in small:
        if not (kept / name).is_file():
            make_directory((kept / name).parent)
            write_bytes(kept / name, folder.read_small(name))
    return make_directory(kept)


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Whatever is wrong with the folder is one sentence that begins with `where`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        name = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{where}: {name}{error}") from error


def _listing(location: str, patience: Patience | None) -> dict[str, RemoteFile]:
    """Name relative to the folder -> file. A bucket's whole prefix, a disk's folder and the one for templates in it."""
    if location.startswith("s3://"):
        prefix = f"{S3Uri.parse(location)}/"
        return {file.location.removeprefix(prefix): file for file in list_files(prefix, patience=patience)}
    path = local_path(location, flag="--init_from")
    found = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else []
    found += [path / name for name in TOKENIZER_FILES if "/" in name and (path / name).is_file()]
    return {
        str(one.relative_to(path)): RemoteFile(
            location=str(one), size_bytes=one.stat().st_size, version=str(one.stat().st_mtime_ns)
        )
        for one in found
    }


def _weight_files(location: str, files: Mapping[str, RemoteFile], patience: Patience | None) -> dict[str, str]:
    """Stored name -> file, by the index; with one file alone its name stands under ''."""
    if INDEX in files:
        with _readable(f"{files[INDEX].location} cannot be read"):
            named: dict[str, str] = json.loads(_content(files[INDEX], patience))["weight_map"]
        missing = sorted({name for name in named.values() if "/" in name or name not in files})
        if missing:
            shown = ", ".join(missing[:_NAMES_SHOWN])
            raise CheckpointError(f"{files[INDEX].location} names {shown}, not found beside it")
        return named
    if SINGLE in files:
        return {"": SINGLE}
    if any(name.endswith(".bin") for name in files):
        found = "pickled weights, which can run code"
    else:
        found = "no weights" if files else "no such folder, or an empty one"
    raise CheckpointError(f"--init_from={location}: found {found}, expected {SINGLE} or {INDEX}")


def _content(file: RemoteFile, patience: Patience | None) -> bytes:
    ranges = open_ranges(file.location, size_bytes=file.size_bytes, patience=patience)
    return bytes(ranges.fetch(0, file.size_bytes))


def _table(name: str, file: RemoteFile, patience: Patience | None) -> dict[str, StoredTensor]:
    """What a file's header says of its tensors, each checked to lie within the file."""
    with _readable(f"{file.location} cannot be read"):
        ranges = open_ranges(file.location, size_bytes=file.size_bytes, patience=patience)
        length = int.from_bytes(ranges.fetch(0, min(_LENGTH_BYTES, file.size_bytes)), "little")
        start = _LENGTH_BYTES + length
        if not 0 < length <= _MOST_HEADER_BYTES or start > file.size_bytes:
            raise ValueError(
                f"a header of {length} bytes in a file of {file.size_bytes}: it was cut off, or is no such file"
            )
        header = json.loads(bytes(ranges.fetch(_LENGTH_BYTES, start)))
        return {
            tensor: _entry(tensor, entry, name, start=start, size_bytes=file.size_bytes)
            for tensor, entry in header.items()
            if tensor != "__metadata__"
        }


def _entry(tensor: str, entry: Any, file: str, *, start: int, size_bytes: int) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    expected = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    is_known = dtype in ITEM_BYTES  # others (float8 and the like) are refused by name when they are asked for
    if not 0 <= begin <= end or min(shape, default=0) < 0 or (is_known and end - begin != expected):
        raise ValueError(f"{tensor} has bytes {begin} to {end}, expected {expected} for {dtype} {shape}")
    if start + end > size_bytes:
        raise ValueError(f"{tensor} ends at byte {start + end} of {size_bytes}: the file was cut off")
    return StoredTensor(file, start + begin, dtype, shape)
