"""Weights from and to directories of Hugging Face's layout (safetensors, config.json, tokenizer)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..distributed.mesh import local_part
from ..errors import CheckpointError, DamagedCheckpoint
from ..storage import make_directory, readable_errors, remove_tree, sync_directory, write_json
from .hf_names import Piece, canonical_names, pieces_in, published_pieces
from .manifest import StoredCheckpoint
from .metadata import read_metadata, read_tensors

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD = "lm_head.weight"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)
_NAMES_SHOWN = 3


class _Directory:
    """The safetensors files of one model, opened as they are needed."""

    def __init__(self, path: Path, wanted: Mapping[str, torch.Tensor]):
        self.path = path
        self._open: dict[str, Any] = {}
        self._files = _files_of(path)
        self.sources = canonical_names(self._files, wanted)

    def slice_of(self, name: str) -> Any:
        """safetensors' lazy view of the stored tensor with this (canonical) name; reads nothing yet."""
        source = self.sources[name]
        file = self._files[source]
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file].get_slice(source)


def _files_of(path: Path) -> dict[str, str]:
    """Stored name -> file. Raises CheckpointError when the directory holds no safetensors model."""
    if (path / _INDEX).is_file():
        with _readable(path / _INDEX):
            files: dict[str, str] = json.loads((path / _INDEX).read_bytes())["weight_map"]
        missing = sorted({name for name in files.values() if "/" in name or not (path / name).is_file()})
        if missing:
            raise CheckpointError(f"{path / _INDEX} names {', '.join(missing[:_NAMES_SHOWN])}, not found beside it")
        return files
    if (path / _SINGLE).is_file():
        with _readable(path / _SINGLE), safe_open(path / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    found = "pickled weights, which can run code" if any(path.glob("*.bin")) else "no weights"
    raise CheckpointError(f"--init_from={path}: found {found}, expected {_SINGLE} or {_INDEX}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def load_hf_weights(directory: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `tensors` (our names; plain, or DTensors of any sharding) from a Hugging Face model directory, in place.

    Each rank reads only what it holds, one tensor at a time; values are cast to the tensors' dtypes. A stored
    `lm_head.weight` is ignored where ours is tied. Raises CheckpointError naming what is missing, extra or mis-shaped.
    """
    path = Path(directory)
    source = _Directory(path, tensors)
    pieces = {name: pieces_in(name, tensor.shape, source.sources) for name, tensor in tensors.items()}
    with _readable(path):
        _check_same_model(source, pieces)
        with torch.no_grad():
            for name, tensor in tensors.items():
                for piece in pieces[name]:
                    _fill(tensor, piece, source)


def _check_same_model(source: _Directory, pieces: Mapping[str, list[Piece]]) -> None:
    wrong = []
    for piece in (piece for parts in pieces.values() for piece in parts):
        if piece.name not in source.sources:
            hint = " (give --tie_word_embeddings 1 if the model ties it)" if piece.name == _HEAD else ""
            wrong.append(f"{piece.name}: found nothing, expected {piece.stored_shape}{hint}")
            continue
        stored = source.slice_of(piece.name)
        shape = tuple(stored.get_shape())
        if shape != piece.stored_shape:
            wrong.append(f"{piece.name}: found {shape}, expected {piece.stored_shape}")
        elif stored.get_dtype() not in _FLOATS:
            wrong.append(f"{piece.name}: found {stored.get_dtype()} (quantised), expected one of {sorted(_FLOATS)}")
    known = {piece.name for parts in pieces.values() for piece in parts}
    for name in source.sources:
        if name not in known and name != _HEAD:
            wrong.append(f"{name}: found in the directory, not in this model")
    if wrong:
        more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise CheckpointError(
            f"--init_from={source.path} holds another model: {'; '.join(wrong[:_NAMES_SHOWN])}{more}. "
            f"Give --model and its settings as in its config.json"
        )


def _fill(tensor: torch.Tensor, piece: Piece, source: _Directory) -> None:
    """Copy what `piece` and this rank's part of `tensor` have in common."""
    local, starts = local_part(tensor)
    first = [max(mine, its) for mine, its in zip(starts, piece.offsets, strict=True)]
    end = [
        min(mine + num, its + size)
        for mine, num, its, size in zip(starts, local.shape, piece.offsets, piece.sizes, strict=True)
    ]
    if any(high <= low for low, high in zip(first, end, strict=True)):
        return
    boxes = [slice(low - its, high - its) for low, high, its in zip(first, end, piece.offsets, strict=True)]
    targets = tuple(slice(low - mine, high - mine) for low, high, mine in zip(first, end, starts, strict=True))
    target = local[targets]
    values = source.slice_of(piece.name)[tuple(boxes[1:] if piece.squeezed else boxes)]
    target.copy_(values.reshape(target.shape))


@dataclass(frozen=True)
class Export:
    """What is written, and how: `dtype` of the weights, files of up to `max_shard_bytes` each."""

    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = 5 * 10**9
    tokenizer_path: Path | None = None  # a tokenizer.json or the folder that holds one
    eos_token_id: int | None = None


def export_hf(checkpoint: StoredCheckpoint, output: Path, hf_config: Any, *, export: Export = Export()) -> None:
    """Write the weights of one checkpoint as a model that transformers' from_pretrained loads.

    One process, no process group; holds one file's weights and one tensor in memory. Everything is verified first,
    written beside `output` and renamed at the end, so that what is called `output` is whole. `hf_config` is the
    transformers configuration of the model. Raises CheckpointError (damaged) and StorageError.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output={output} exists already; expected a new or empty directory")
    manifest = checkpoint.manifest()
    if damage := [text for name in manifest.files if (text := checkpoint.damage(manifest, name))]:
        raise DamagedCheckpoint("; ".join(damage))
    temporary = output.with_name(f".{output.name}.partial")
    remove_tree(temporary)
    make_directory(temporary)
    try:
        _write_weights(checkpoint, temporary, export)
        with readable_errors(output, "writing"):
            _write_config(temporary, hf_config, export)
            _write_tokenizer(temporary, export)
            sync_directory(temporary)
            if output.exists():
                output.rmdir()
            temporary.rename(output)
            sync_directory(output.parent)
    finally:
        remove_tree(temporary)


def _write_weights(checkpoint: StoredCheckpoint, output: Path, export: Export) -> None:
    manifest = checkpoint.manifest()
    metadata = read_metadata(checkpoint, manifest)
    stored = {
        name.removeprefix("model/"): entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model/") and isinstance(entry, TensorStorageMetadata)
    }
    shards = _shards({name: entry.size for name, entry in stored.items()}, export)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights: dict[str, torch.Tensor] = {}
        for name in names:
            entry = stored[name]
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            read_tensors(checkpoint, manifest, metadata, {f"model/{name}": tensor})
            weights |= {piece.name: _cut(tensor, piece, export.dtype) for piece in published_pieces(name, entry.size)}
        with readable_errors(output / file, "writing"), _no_space_as_os_error():
            save_file(weights, output / file, metadata={"format": "pt"})
            _sync_file(output / file)
        weight_map |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        num_elements = sum(entry.size.numel() for entry in stored.values())
        total = {"total_size": num_elements * export.dtype.itemsize, "total_parameters": num_elements}
        write_json(output / _INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _shards(shapes: Mapping[str, torch.Size], export: Export) -> list[list[str]]:
    """Names by file, in order; a tensor larger than a file's limit has one of its own."""
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = shape.numel() * export.dtype.itemsize
        if shards[-1] and size_bytes + tensor_bytes > export.max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += tensor_bytes
    return shards


def _cut(tensor: torch.Tensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    box = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
    # A copy, because safetensors refuses two tensors that share memory.
    return torch.empty(piece.stored_shape, dtype=dtype).copy_(tensor[box].reshape(piece.stored_shape))


def _write_config(output: Path, hf_config: Any, export: Export) -> None:
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    hf_config.dtype = export.dtype
    hf_config.use_cache = True  # off in training, where nothing is generated
    if export.eos_token_id is not None:
        hf_config.eos_token_id = export.eos_token_id
    hf_config.save_pretrained(output)
    GenerationConfig.from_model_config(hf_config).save_pretrained(output)


def _write_tokenizer(output: Path, export: Export) -> None:
    tokenizer = export.tokenizer_path
    if tokenizer is None:
        return
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    if tokenizer.is_file() and tokenizer.name != "tokenizer.json":
        shutil.copyfile(tokenizer, output / "tokenizer.json")
    if not (output / "tokenizer_config.json").exists():
        settings: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if export.eos_token_id is not None:
            from tokenizers import Tokenizer

            settings["eos_token"] = Tokenizer.from_file(str(output / "tokenizer.json")).id_to_token(export.eos_token_id)
        write_json(output / "tokenizer_config.json", settings)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _no_space_as_os_error() -> Iterator[None]:
    """safetensors reports the disk's refusal as its own error, with the number in its text."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error)) from error
