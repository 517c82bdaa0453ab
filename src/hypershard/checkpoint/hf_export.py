"""Weights to model folders of Hugging Face's layout, on a disk or in a bucket: in parallel, and going on when killed.

    OUTPUT/.export.json                        while it is made: whose weights, and which files are whole
    OUTPUT/model-00001-of-00003.safetensors    by any of the processes
    OUTPUT/model.safetensors.index.json, tokenizer.json, …, README.md
    OUTPUT/config.json                         last: without it no program takes the folder for a model

A file is whole exactly when the journal names it, which it does after the file is safe. The same weights and options
give the same bytes, so it does not matter how often an export was cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import CheckpointError
from ..storage import exclusive, make_directory
from .hf_folder import CONFIG, INDEX, SINGLE
from .hf_names import published_pieces
from .manifest import StoredCheckpoint
from .metadata import read_metadata, read_tensors
from .stores import DiskStore, Store, open_store

JOURNAL = ".export.json"
_SPELLINGS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_ALIGNMENT_BYTES = 8  # of the header's length, so that tensors begin at whole words


class Weights(Protocol):
    """The weights that are exported, by our names. Is sent to the processes that write, so it can be pickled."""

    @property
    def identity(self) -> str:
        """Changes when a value may change."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Whole tensors on the host, those of one file. Raises CheckpointError or StorageError."""


class CheckpointWeights:
    """The weights of one training checkpoint; no byte that is not as saved is handed out."""

    def __init__(self, stored: StoredCheckpoint):
        self._stored = stored
        self._manifest = stored.manifest()
        self._metadata = read_metadata(stored, self._manifest)
        self.shapes = {
            name.removeprefix("model/"): tuple(entry.size)
            for name, entry in self._metadata.state_dict_metadata.items()
            if name.startswith("model/") and isinstance(entry, TensorStorageMetadata)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        stored = self._stored  # a bucket's client stays here
        return _reopened, (stored.store.location, stored.folder, stored.step, stored.attempt, stored.files)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self._manifest.to_bytes()).hexdigest()

    def read(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # All in one go: a block of many small parts of tensors, as jobs of many ranks leave them, is read just once.
        tensors = {name: torch.empty(self.shapes[name], dtype=dtype) for name in names}
        named = {f"model/{name}": tensor for name, tensor in tensors.items()}
        read_tensors(self._stored, self._manifest, self._metadata, named)
        return tensors


def _reopened(location: str, folder: str, step: int, attempt: int, files: dict[str, int]) -> CheckpointWeights:
    return CheckpointWeights(StoredCheckpoint(open_store(location), folder, step, attempt, files))


@dataclass(frozen=True)
class WeightFile:
    """One file of an export: its name and the tensors in it, in order."""

    name: str
    tensors: tuple[str, ...]
    size_bytes: int  # of the tensors


@dataclass(frozen=True)
class Export:
    """What is written where: the weights in files of up to `max_shard_bytes`, and `small_files` beside them."""

    weights: Weights
    output: str  # a path or s3://bucket/prefix
    small_files: Mapping[str, bytes]  # config.json among them
    dtype: torch.dtype
    max_shard_bytes: int

    @property
    def identity(self) -> str:
        """Two exports with the same one write the same bytes."""
        small = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.small_files.items())}
        parts = (self.weights.identity, str(self.dtype), self.max_shard_bytes, small)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def files(self) -> list[WeightFile]:
        """The weight files in order; a tensor larger than the limit has a file of its own."""
        groups: list[list[str]] = [[]]
        sizes = [0]
        for name, shape in self.weights.shapes.items():
            tensor_bytes = torch.Size(shape).numel() * self.dtype.itemsize
            if groups[-1] and sizes[-1] + tensor_bytes > self.max_shard_bytes:
                groups.append([])
                sizes.append(0)
            groups[-1].append(name)
            sizes[-1] += tensor_bytes
        num = len(groups)
        names = [SINGLE] if num == 1 else [f"model-{i:05d}-of-{num:05d}.safetensors" for i in range(1, num + 1)]
        return [WeightFile(*one) for one in zip(names, map(tuple, groups), sizes, strict=True)]


WriteFiles = Callable[[Export, Sequence[WeightFile], Callable[[WeightFile], None]], None]


def write_model(export: Export, *, write_files: WriteFiles) -> None:
    """Write a model folder that transformers' from_pretrained loads, or go on with one that was cut off.

    `write_files(export, files, done)` writes some of the files and tells `done` of each that is safe (`write_here`, or
    hf_processes.py). Raises CheckpointError when the output holds anything else or the checkpoint is damaged (then
    nothing stays), StorageError when a place refuses (then the next call goes on).
    """
    store = open_store(export.output)
    with _alone(store):
        finished = _begin(store, export)
        files = export.files()

        def done(file: WeightFile) -> None:
            finished.append(file.name)
            _note(store, export, finished)

        try:
            write_files(export, [file for file in files if file.name not in finished], done)
        except CheckpointError:
            _forget(store, files)
            raise
        store.settle("")
        small = dict(export.small_files)
        config = small.pop(CONFIG)
        if len(files) > 1:
            small[INDEX] = _index(export, files)
        for name, content in sorted(small.items()):
            store.write("", name, content)
        store.write("", CONFIG, config)
        for name in store.files(""):
            # Also what a process that was killed while it wrote a small file left (storage.write_bytes).
            if name == JOURNAL or (name.startswith(".") and name.endswith(".tmp")):
                store.delete("", name)


def write_here(export: Export, files: Sequence[WeightFile], done: Callable[[WeightFile], None]) -> None:
    """Write `files` one after the other in this process."""
    store = open_store(export.output)
    for file in files:
        write_file(export, file, store)
        done(file)


def write_file(export: Export, file: WeightFile, store: Store) -> None:
    """Write one safetensors file (see hf_folder.py for the format). README.md says what it holds in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    begin = 0
    shapes = export.weights.shapes
    for name in file.tensors:
        for piece in published_pieces(name, shapes[name]):
            end = begin + torch.Size(piece.stored_shape).numel() * export.dtype.itemsize
            offsets = {"shape": list(piece.stored_shape), "data_offsets": [begin, end]}
            header[piece.name] = {"dtype": _SPELLINGS[export.dtype], **offsets}
            begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    tensors = export.weights.read(file.tensors, export.dtype)
    with store.stream("", file.name, seconds=None) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name in file.tensors:
            tensor = tensors.pop(name)
            for piece in published_pieces(name, shapes[name]):
                box = (slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
                sink.write(tensor[tuple(box)].contiguous().view(-1).view(torch.uint8).numpy())


def _index(export: Export, files: Sequence[WeightFile]) -> bytes:
    shapes = export.weights.shapes
    num_elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    places = {
        piece.name: file.name
        for file in files
        for name in file.tensors
        for piece in published_pieces(name, shapes[name])
    }
    total = {"total_size": num_elements * export.dtype.itemsize, "total_parameters": num_elements}
    return (json.dumps({"metadata": total, "weight_map": dict(sorted(places.items()))}, indent=1) + "\n").encode()


def _alone(store: Store) -> contextlib.AbstractContextManager[None]:
    """Be the only one that writes to a folder on a disk. A bucket has no locks; equal exports write equal bytes."""
    if not isinstance(store, DiskStore):
        return contextlib.nullcontext()
    folder = store.directory.absolute()
    make_directory(folder.parent)
    return exclusive(folder.with_name(f".{folder.name}.lock"), doing=f"exporting to {folder}")


def _begin(store: Store, export: Export) -> list[str]:
    """The names of the weight files that an equal export finished. Raises CheckpointError for anything else."""
    there = store.files("")
    if JOURNAL not in there:
        if there:
            raise CheckpointError(f"--output={export.output} exists already; expected a new or empty directory")
        _note(store, export, [])
        return []
    if not isinstance(store, DiskStore):
        store.make("")  # closes the uploads that it left open
    try:
        journal = json.loads(store.read("", JOURNAL))
        identity, finished = journal["identity"], [str(name) for name in journal["finished"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"--output={export.output}: {JOURNAL} is damaged ({error}); delete the folder or choose another"
        ) from error
    if identity != export.identity:
        raise CheckpointError(
            f"--output={export.output} holds an unfinished export of other weights, or with other flags or files; "
            f"repeat that one, delete the folder or choose another"
        )
    return [name for name in finished if name in there]


def _note(store: Store, export: Export, finished: Sequence[str]) -> None:
    value = {"identity": export.identity, "finished": list(finished)}
    store.write("", JOURNAL, (json.dumps(value, indent=1) + "\n").encode())


def _forget(store: Store, files: Sequence[WeightFile]) -> None:
    """Delete what was written; the journal last, so that a folder cut off here is known for what it is."""
    for name in (*(file.name for file in files), JOURNAL):
        store.delete("", name)
    if isinstance(store, DiskStore):
        with contextlib.suppress(OSError):
            store.directory.rmdir()
