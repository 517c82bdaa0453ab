"""Where the checkpoints of a run lie, as far as it can be seen from this node."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ..checkpoint.manifest import Place, StoredCheckpoint, existing_place
from ..checkpoint.node_blobs import BlobSet, NodeBlobs, blobs_below, run_root
from ..checkpoint.stores import DiskStore, open_store, run_of
from ..checkpoint.survey import Condition, Found, best_of, survey
from ..checkpoint.transfer import configuration_of
from ..config.schema import CheckpointConfig
from ..config.sources import Layer, read_yaml, resolve
from ..errors import CheckpointError, ConfigError, StorageError
from ..log import logger
from ..storage import local_path

PLACE = "run directory, checkpoint directory, one step's directory, or an s3:// URI of one"  # in helps
_AT_STEP = re.compile(r"(.+)@(\d+|best|newest)")

Step: TypeAlias = int | Literal["best"] | None
"""Which checkpoint of a run is meant: None: the one that a resume would take; 'best': of the lowest validation loss."""


def add_step(parser: argparse.ArgumentParser) -> None:
    """The flag --step, a `Step`."""
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best|newest",
        help="the checkpoint of this step, or of the lowest validation loss; default: newest, as of a resume",
    )


def _step(text: str) -> Step:
    if text == "newest":
        return None
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a step's number, 'best' or 'newest'")
    return int(text)


@dataclass(frozen=True)
class OnNode:
    """A tier of this node. `root` is where this run's blobs lie; None when it has none here."""

    tier: str
    root: Path | None
    blobs: NodeBlobs


@dataclass(frozen=True)
class Stored:
    """What a PLACE stands for and what is stored there, in the order of a resume.

    `settings` are those of the run it belongs to, where it has a config.yaml; `trouble` says why that is of no use.
    """

    place: Place
    found: list[Found]
    settings: CheckpointConfig | None = None
    trouble: str | None = None

    @property
    def location(self) -> str:
        return self.place.store.location


@dataclass(frozen=True)
class Whereabouts:
    """Everything that is left of a run, as far as it can be seen from here.

    `silent` maps tiers (or config.yaml) that could not be asked to the reason.
    """

    stored: Stored
    bucket: Place | None
    in_bucket: list[Found]
    on_node: tuple[OnNode, ...]
    silent: dict[str, str]

    @property
    def blob_sets(self) -> list[BlobSet]:
        return [blobs for tier in self.on_node for blobs in tier.blobs.sets]


def stored_at(text: str) -> Stored:
    """Look at the PLACE `text` and at nothing else. Raises CheckpointError and StorageError."""
    place = existing_place(text)
    found = survey(place)
    if place.folder is not None or not isinstance(place.store, DiskStore):
        return Stored(place, found)
    path = configuration_of(place.store)
    if path is None:
        return Stored(place, found)
    try:
        settings = resolve(Layer(str(path), read_yaml(path)[0])).config.checkpoint
    except ConfigError as error:
        return Stored(place, found, trouble=f"{error}; the other tiers of this run are not looked at")
    if not found and settings.checkpoint_dir is not None:
        place = Place(DiskStore(local_path(settings.checkpoint_dir, flag="--checkpoint_dir")))
        found = survey(place)
    return Stored(place, found, settings)


def whereabouts(text: str) -> Whereabouts:
    """Look at a PLACE and, for a run on a disk, at what else its configuration names.

    Raises CheckpointError and StorageError for the place itself, not for the others.
    """
    stored = stored_at(text)
    silent = {} if stored.trouble is None else {"config.yaml": stored.trouble}
    bucket, in_bucket = _bucket(stored.settings, silent)
    return Whereabouts(stored, bucket, in_bucket, on_this_node(stored, silent), silent)


def _bucket(settings: CheckpointConfig | None, silent: dict[str, str]) -> tuple[Place | None, list[Found]]:
    if settings is None or settings.s3_tier_base_path is None:
        return None, []
    try:
        bucket = Place(open_store(settings.s3_tier_base_path))
        return bucket, survey(bucket)
    except StorageError as error:
        silent["s3"] = f"{settings.s3_tier_base_path} cannot be asked: {error}"
        return None, []


def on_this_node(stored: Stored, silent: dict[str, str]) -> tuple[OnNode, ...]:
    """What a run has in this node's memory and on its own disk; tiers that cannot be read are added to `silent`."""
    settings = stored.settings
    if settings is None:
        return ()
    directories = [("memory", "--memory_tier_dir", settings.memory_tier_dir)]
    if settings.local_tier_dir is not None:
        directories.append(("local", "--local_tier_dir", settings.local_tier_dir))
    tiers = []
    for tier, flag, directory in directories:
        try:
            run = run_of(stored.place.store)
            root = None if run is None else run_root(local_path(directory, flag=flag), run)
            blobs = NodeBlobs((), ()) if root is None or run is None else blobs_below(root, tier=tier, run=run)
            tiers.append(OnNode(tier, root, blobs))
        except StorageError as error:
            silent[tier] = str(error)
    return tuple(tiers)


def chosen(stored: Stored, step: Step) -> Found:
    """The complete checkpoint that `step` means; damaged ones that a resume would take before it are named.

    Raises CheckpointError when there is none.
    """
    found = stored.found
    complete = [one for one in found if one.is_complete]
    if step == "best":
        step = _best_step(stored) if complete else None
    wanted = [one for one in complete if step in (None, one.stored.step)]
    if wanted:
        for one in found[: found.index(wanted[0])] if step is None else ():
            if one.condition is Condition.DAMAGED:
                logger.warning(f"{one.stored.location} is passed over, it is damaged: {one.detail}")
        return wanted[0]
    if step is not None and complete:
        steps = ", ".join(str(one.stored.step) for one in complete)
        raise CheckpointError(f"--step={step}: {stored.location} has steps {steps}")
    broken = [one for one in found if step in (None, one.stored.step)]
    if broken:
        raise CheckpointError(f"{broken[0].stored.location} is {broken[0].condition}: {broken[0].detail}")
    raise CheckpointError(f"{stored.location}: found no checkpoint (a folder named step-XXXXXXXX)")


def _best_step(stored: Stored) -> int:
    best = best_of(stored.found)
    if best is None:
        raise CheckpointError(
            f"--step=best: {stored.location}: nothing was validated before its newest checkpoint; give --step=N, or "
            f"--step=newest"
        )
    if not best.is_kept:
        steps = ", ".join(str(one.stored.step) for one in stored.found if one.is_complete)
        raise CheckpointError(
            f"--step=best: the lowest validation loss, {best.loss:.4f}, was that of step {best.step}, which "
            f"{stored.location} does not keep any more; it has steps {steps}"
        )
    return best.step


def one_checkpoint(text: str) -> StoredCheckpoint:
    """The checkpoint that `PLACE` or `PLACE@STEP` names: its only one, that step's, or the newest."""
    match = _AT_STEP.fullmatch(text)
    where, step = (match[1], _step(match[2])) if match else (text, None)
    stored = stored_at(where)
    if match and stored.place.folder is not None:
        raise CheckpointError(f"{text}: {where} is one checkpoint already; expected PLACE@STEP or a step's folder")
    return chosen(stored, step).stored
