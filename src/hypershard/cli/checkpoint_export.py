"""`hypershard checkpoint export`: a training checkpoint as a model directory that transformers loads."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import Place, StoredCheckpoint
from ..checkpoint.stores import DiskStore
from ..checkpoint.transfer import Progress, beside, existing_at
from ..config.schema import ModelConfig
from ..config.sources import parse_yaml
from ..errors import CheckpointError, ConfigError
from ..log import logger
from ..storage import local_path, remove_tree
from ..units import format_bytes, format_seconds
from .checkpoint_adapters import whole_weights, write_adapter
from .checkpoint_places import Stored, chosen, stored_at
from .checkpoint_transfer import whole_set
from .place import place_tokenizer
from .progress import shown_bytes

if TYPE_CHECKING:
    from ..checkpoint.hf_export import Weights
    from ..checkpoint.model_card import Training

_MOST_WORKERS = 4  # by default: each holds a file in memory, and a disk is busy with so many


def default_workers() -> int:
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def export(args: argparse.Namespace) -> int:
    """Write the model directory, or go on with one that was cut off. Raises a UserError."""
    import torch

    from ..checkpoint.hf_export import Export, write_model
    from ..checkpoint.hf_processes import writer

    started_at = time.monotonic()
    output = args.output.rstrip("/")
    if not output.startswith("s3://"):
        output = str(local_path(output, flag="--output"))
    source = stored_at(args.place)
    with _checkpoint(args, source, output) as stored:
        if args.adapter:
            return _export_adapter(args, stored, output)
        weights = whole_weights(stored, base=args.base)
        dtype = getattr(torch, args.dtype)
        small_files = _small_files(args, source.place, stored, weights, name=PurePosixPath(output).name)
        one = Export(weights, output, small_files, dtype, int(args.max_shard_gb * 1e9))
        size_bytes = sum(file.size_bytes for file in one.files())
        with shown_bytes(size_bytes, "exporting") as show:
            write_model(one, write_files=writer(args.num_workers, show))
    print(
        f"{output}: step {stored.step} in {args.dtype}, {len(one.files())} files of weights, "
        f"{format_bytes(size_bytes)}, from {stored.location}; {format_seconds(time.monotonic() - started_at)}"
    )
    return 0


def _export_adapter(args: argparse.Namespace, stored: StoredCheckpoint, output: str) -> int:
    if output.startswith("s3://"):
        raise CheckpointError(f"--adapter: found --output={output}, expected a directory; adapters are small, copy it")
    write_adapter(stored, Path(output), base=args.base)
    print(f"{output}: step {stored.step}, adapters in PEFT's format, from {stored.location}")
    return 0


@contextlib.contextmanager
def _checkpoint(args: argparse.Namespace, source: Stored, output: str) -> Iterator[StoredCheckpoint]:
    """The checkpoint asked for. What is on this node only is put together beside the output, and deleted again."""
    if args.tier is None:
        yield chosen(source, args.step).stored
        return
    from ..checkpoint.assemble import assemble

    if output.startswith("s3://"):
        raise CheckpointError(
            f"--from {args.tier} needs room on a disk: expected --output to be a directory; or take it to the bucket "
            f"by `hypershard checkpoint copy --from {args.tier}` and export that"
        )
    blobs = whole_set(source, args.tier, args.step)
    folder = Path(output).absolute()
    target = DiskStore(folder.with_name(f".{folder.name}.checkpoint"))
    stored = existing_at(target, blobs.step, lambda other: other.lineage == blobs.lineage)
    if stored is None:
        with shown_bytes(2 * blobs.size_bytes, "putting together") as show:
            stored = assemble(blobs, target, Progress(show))
    try:
        yield stored
    except CheckpointError:  # after anything else the same command goes on with it
        remove_tree(target.directory)
        raise
    remove_tree(target.directory)


def _small_files(
    args: argparse.Namespace, place: Place, stored: StoredCheckpoint, weights: Weights, *, name: str
) -> dict[str, bytes]:
    """Everything beside the weights. Raises CheckpointError when weights or tokenizer are not those of the model."""
    import torch

    from ..checkpoint.hf_small_files import config_files, special_ids, tokenizer_files
    from ..checkpoint.model_card import model_card
    from ..data.encode.tokenizer import load_tokenizer
    from ..models.family import family_of

    facts = stored.facts(stored.manifest())
    model = ModelConfig(**facts["model"])
    family = family_of(model.model_type)
    shapes = {spec.name: spec.shape for spec in family.parameters(model)}
    if weights.shapes != shapes:
        different = sorted(set(weights.shapes.items()) ^ set(shapes.items()))[0][0]
        raise CheckpointError(f"{place.store.location} holds other weights than those of its model: {different}")
    files: dict[str, bytes] = {}
    eos_token_id = facts.get("eos_token_id")
    with place_tokenizer(place, args.tokenizer) as given:
        if given is None:
            logger.warning("the run keeps no tokenizer and no --tokenizer is given: the model directory will have none")
        else:
            tokenizer = load_tokenizer(given)
            eos_token_id = tokenizer.eos_token_id
            if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
                raise CheckpointError(
                    f"--tokenizer={given} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}; "
                    f"give the tokenizer it was trained with"
                )
            files = tokenizer_files(tokenizer.path, eos_token_id=eos_token_id)
    dtype = getattr(torch, args.dtype)
    files |= config_files(family.hf_config(model), dtype=dtype, ids=special_ids(files, eos_token_id=eos_token_id))
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    card = model_card(_training(place, stored.step, facts), name=name, num_parameters=num_parameters, dtype=args.dtype)
    return files | {"README.md": card.encode()}


def _training(place: Place, step: int, facts: dict[str, Any]) -> Training:
    """What lies beside the checkpoints of how they came to be."""
    from ..checkpoint.model_card import Training, lines_of

    found = {name: beside(place.store, "", name) for name in ("config.yaml", "environment.json", "metrics.jsonl")}
    config: dict[str, Any] = {}
    try:
        config = parse_yaml((found["config.yaml"] or b"").decode(), where="config.yaml")[0]
    except ConfigError as error:
        logger.warning(f"{error}; the model card will not say what it says")
    environment = json.loads(found["environment.json"] or b"{}")
    return Training(step, facts, config, environment, lines_of(found["metrics.jsonl"] or b""))
