"""`hypershard checkpoint export`: a training checkpoint as a model directory that transformers loads."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..checkpoint.hf_folder import GENERATION_CONFIG, TOKENIZER_FILES
from ..checkpoint.manifest import Place, StoredCheckpoint
from ..checkpoint.stores import DiskStore
from ..checkpoint.transfer import Progress, beside, existing_at
from ..config.schema import ModelConfig
from ..config.sources import parse_yaml
from ..errors import CheckpointError, ConfigError
from ..log import logger
from ..models.family import family_of, parameter_count
from ..storage import local_path, remove_tree
from ..units import format_bytes, format_seconds
from .checkpoint_adapters import base_folder, is_model_folder, whole_weights, write_adapter
from .checkpoint_merge import FolderAdapters, FolderWeights, MergedWeights
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


@dataclass(frozen=True)
class _Subject:
    """Whole weights of a model, and what is known of them. `tokenizer`: its folder or file; None: there is none."""

    weights: Weights
    model: ModelConfig
    tokenizer: Path | None
    eos_token_id: int | None
    training: Training
    origin: str


def export(args: argparse.Namespace) -> int:
    """Write the model directory, or go on with one that was cut off. Raises a UserError."""
    output = args.output.rstrip("/")
    if not output.startswith("s3://"):
        output = str(local_path(output, flag="--output"))
    if None in args.adapter:
        return _export_adapter(args, output)
    if args.adapter and is_model_folder(args.place):
        with _of_folder(args) as subject:
            return _write(args, subject, output)
    source = stored_at(args.place)
    with _checkpoint(args, source, output) as stored, _of_checkpoint(args, source.place, stored) as subject:
        return _write(args, subject, output)


def _write(args: argparse.Namespace, subject: _Subject, output: str) -> int:
    import torch

    from ..checkpoint.hf_export import Export, write_model
    from ..checkpoint.hf_processes import writer

    started_at = time.monotonic()
    small_files = _small_files(args, subject, name=PurePosixPath(output).name)
    one = Export(subject.weights, output, small_files, getattr(torch, args.dtype), int(args.max_shard_gb * 1e9))
    size_bytes = sum(file.size_bytes for file in one.files())
    with shown_bytes(size_bytes, "exporting") as show:
        write_model(one, write_files=writer(args.num_workers, show))
    merged = "".join(f" + {given.weight:g} x {given.location}" for given in args.adapter)
    print(
        f"{output}: {subject.origin}{merged} in {args.dtype}, {len(one.files())} files of weights, "
        f"{format_bytes(size_bytes)}; {format_seconds(time.monotonic() - started_at)}"
    )
    return 0


def _export_adapter(args: argparse.Namespace, output: str) -> int:
    if len(args.adapter) > 1:
        raise CheckpointError("--adapter without a folder writes the run's adapters alone; found it with others")
    if output.startswith("s3://"):
        raise CheckpointError(f"--adapter: found --output={output}, expected a directory; adapters are small, copy it")
    with _checkpoint(args, stored_at(args.place), output) as stored:
        write_adapter(stored, Path(output), base=args.base)
        print(f"{output}: step {stored.step}, adapters in PEFT's format, from {stored.location}")
    return 0


@contextlib.contextmanager
def _of_checkpoint(args: argparse.Namespace, place: Place, stored: StoredCheckpoint) -> Iterator[_Subject]:
    weights = whole_weights(stored, base=args.base, more=args.adapter)
    facts = stored.facts(stored.manifest())
    model = ModelConfig(**facts["model"])
    shapes = {spec.name: spec.shape for spec in family_of(model.model_type).parameters(model)}
    if weights.shapes != shapes:
        different = sorted(set(weights.shapes.items()) ^ set(shapes.items()))[0][0]
        raise CheckpointError(f"{place.store.location} holds other weights than those of its model: {different}")
    with place_tokenizer(place, args.tokenizer) as tokenizer:
        yield _Subject(
            weights=weights,
            model=model,
            tokenizer=tokenizer,
            eos_token_id=facts.get("eos_token_id"),
            training=_training(place, stored.step, facts),
            origin=f"step {stored.step} of {stored.location}",
        )


@contextlib.contextmanager
def _of_folder(args: argparse.Namespace) -> Iterator[_Subject]:
    from ..checkpoint.hf_folder import local_copy
    from ..checkpoint.model_card import Training
    from ..models.from_hf import model_of_folder

    if args.tier is not None or args.step is not None or args.base is not None:
        raise CheckpointError(f"{args.place} is a model directory: --step, --from and --base belong to a run's")
    folder = base_folder(args.place)
    with tempfile.TemporaryDirectory(prefix="hypershard-") as temporary:
        local = local_copy(folder, Path(temporary))
        model = model_of_folder(local, location=args.place)
        parts = [FolderAdapters(given, model) for given in args.adapter]
        tokenizer = local if args.tokenizer is None else local_path(args.tokenizer, flag="--tokenizer")
        yield _Subject(
            weights=MergedWeights(FolderWeights(folder, model), parts, location=args.place),
            model=model,
            tokenizer=tokenizer if tokenizer.is_file() or (tokenizer / TOKENIZER_FILES[0]).is_file() else None,
            eos_token_id=None,
            training=Training(None, {"model": dataclasses.asdict(model)}, {"init_from": args.place}, {}, []),
            origin=args.place,
        )


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
    if args.step == "best":
        raise CheckpointError(f"--step=best with --from {args.tier}: what nodes hold is the newest; give --step=N")
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


def _small_files(args: argparse.Namespace, subject: _Subject, *, name: str) -> dict[str, bytes]:
    """Everything beside the weights. Raises CheckpointError when the tokenizer is not that of the model."""
    import torch

    from ..checkpoint.hf_small_files import config_files, special_ids, tokenizer_files
    from ..checkpoint.model_card import model_card
    from ..data.encode.tokenizer import load_tokenizer

    model = subject.model
    files: dict[str, bytes] = {}
    eos_token_id = subject.eos_token_id
    if subject.tokenizer is None:
        logger.warning("no tokenizer is kept there and no --tokenizer is given: the model directory will have none")
    else:
        tokenizer = load_tokenizer(subject.tokenizer)
        eos_token_id = tokenizer.eos_token_id
        if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
            raise CheckpointError(
                f"--tokenizer={subject.tokenizer} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}; "
                f"give the tokenizer it was trained with"
            )
        files = tokenizer_files(tokenizer.path, eos_token_id=eos_token_id)
    generation = files.pop(GENERATION_CONFIG, None)
    files |= config_files(
        family_of(model.model_type).hf_config(model),
        dtype=getattr(torch, args.dtype),
        ids=special_ids(files, eos_token_id=eos_token_id),
        generation=generation,
    )
    card = model_card(
        subject.training,
        name=name,
        num_parameters=parameter_count(model),
        dtype=args.dtype,
        merged=[(given.location, given.weight) for given in args.adapter],
    )
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
