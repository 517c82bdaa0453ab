"""What `export`, `generate` and `chat` make of adapters: whole weights, or a folder in PEFT's format."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.targets import adapter_targets
from ..checkpoint.hf_folder import CONFIG
from ..checkpoint.manifest import StoredCheckpoint
from ..checkpoint.stores import open_store
from ..config.schema import AdapterConfig, DataConfig, ModelConfig
from ..errors import CheckpointError
from ..models.family import family_of
from ..storage import make_directory, remove_tree, sync_directory
from .checkpoint_merge import Adapters, CheckpointAdapters, FolderAdapters, FolderWeights, GivenAdapter, MergedWeights

if TYPE_CHECKING:
    from ..checkpoint.hf_export import Weights
    from ..checkpoint.hf_folder import ModelFolder


def add_adapters(parser: argparse.ArgumentParser, *, bare: str | None = None) -> None:
    """The flags --adapter, which may be given often, and --base. `bare` says what --adapter means without a folder."""
    text = (
        "adapters in PEFT's format, a folder or s3://bucket/prefix, that are merged in; they count WEIGHT times, "
        "default 1; may be given more than once"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        nargs=None if bare is None else "?",
        type=GivenAdapter.parse,
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help=text if bare is None else f"{text}; {bare}",
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="of --lora_r: the model the adapters were trained beside; default: where --init_from had it",
    )


def whole_weights(stored: StoredCheckpoint, *, base: str | None, more: Sequence[GivenAdapter]) -> Weights:
    """The model's weights at a checkpoint; of adapters with the weights they were trained beside, merged.

    Those are read from `base`, a folder or s3://bucket/prefix; None: from where the run had them. What the run held in
    NF4 is merged into the model's own weights, not into these rounded to four bits. The adapters of `more` are merged
    too. Raises CheckpointError when something is not there or was changed.
    """
    from ..checkpoint.hf_export import CheckpointWeights

    facts = stored.facts(stored.manifest())
    weights: Weights = CheckpointWeights(stored)
    model = ModelConfig(**facts["model"])
    parts: list[Adapters] = [FolderAdapters(given, model) for given in more]
    if facts.get("adapters") is None:
        if base is not None:
            raise CheckpointError(f"--base={base} acts only on adapters, and {stored.location} holds a whole model")
        return MergedWeights(weights, parts, location=stored.location) if parts else weights
    assert isinstance(weights, CheckpointWeights)
    location = base_location(facts, base)
    own = CheckpointAdapters(weights, facts, location=stored.location)
    return MergedWeights(FolderWeights(base_folder(location), model), [own, *parts], location=location)


def is_model_folder(location: str) -> bool:
    """Whether a path or s3:// URI is of a model directory. Raises StorageError when a bucket does not answer."""
    return CONFIG in open_store(location.rstrip("/")).files("")


def base_folder(location: str) -> ModelFolder:
    """The model folder that adapters stand beside: a path, s3://bucket/prefix or a hub's name, as for --init_from.

    Raises CheckpointError, DataError and StorageError when it cannot be looked at.
    """
    from ..train.init_from import find_model_folder

    return find_model_folder(location, Path(DataConfig().cache_dir).expanduser())


def base_location(facts: Mapping[str, Any], given: str | None) -> str:
    """Where the weights lie that a checkpoint's adapters stand beside. Raises CheckpointError for random ones."""
    base = given or str(facts["base"]["init_from"])
    if base == "scratch":
        raise CheckpointError(
            "these adapters were trained beside random weights, drawn from the seed: there is no model to merge them "
            "into; --adapter writes them by themselves"
        )
    return base


def write_adapter(stored: StoredCheckpoint, output: Path, *, base: str | None) -> None:
    """Write a checkpoint's adapters as `peft` reads them. Raises CheckpointError and StorageError."""
    import torch

    from ..adapters.peft_format import save_peft
    from ..checkpoint.hf_export import CheckpointWeights

    facts = stored.facts(stored.manifest())
    if facts.get("adapters") is None:
        raise CheckpointError(f"--adapter: {stored.location} holds a whole model and no adapters; drop the flag")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output={output} exists already; expected a new or empty directory")
    config, model = AdapterConfig(**facts["adapters"]), ModelConfig(**facts["model"])
    targets = adapter_targets(model, config)
    weights = CheckpointWeights(stored)
    tensors = weights.read(list(weights.shapes), torch.float32)
    trained_beside = base or facts["base"]["init_from"]
    temporary = output.with_name(f".{output.name}.partial")
    remove_tree(temporary)
    make_directory(temporary)
    try:
        save_peft(
            temporary,
            tensors,
            targets,
            adapters=config,
            base=None if trained_beside == "scratch" else trained_beside,
            training=_training(stored, facts, model, config),
        )
        sync_directory(temporary)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
        sync_directory(output.parent)
    finally:
        remove_tree(temporary)


def _training(
    stored: StoredCheckpoint, facts: Mapping[str, Any], model: ModelConfig, config: AdapterConfig
) -> dict[str, Any]:
    """What PEFT's settings have no place for, and `checkpoint_merge.py` and `checkpoint_list_adapters.py` ask."""
    names = [spec.name for spec in family_of(model.model_type).parameters(model)]
    return {
        "step": stored.step,
        "bit_sums": dict(zip(names, facts["base"]["bit_sums"], strict=True)),
        "bnb_quant_type": config.bnb_quant_type,
        "bnb_double_quant": config.bnb_double_quant,
    }
