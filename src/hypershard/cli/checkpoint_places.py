"""Where the checkpoints of a run lie, as far as it can be seen from this node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.manifest import Place, StoredCheckpoint, existing_place
from ..checkpoint.node_blobs import BlobSet, NodeBlobs, blobs_below, run_root
from ..checkpoint.stores import DiskStore, open_store
from ..checkpoint.survey import Condition, Found, survey
from ..checkpoint.transfer import configuration_of, run_of
from ..config.schema import CheckpointConfig
from ..config.sources import Layer, read_yaml, resolve
from ..errors import CheckpointError, ConfigError, StorageError
from ..log import logger
from ..storage import local_path

_AT_STEP = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class OnNode:
    """A tier of this node. `root` is where this run's blobs lie; None when it has none here."""

    tier: str
    root: Path | None
    blobs: NodeBlobs


@dataclass(frozen=True)
class Whereabouts:
    """What a PLACE stands for: the place itself and, for a run, what else its configuration names.

    `silent` maps tiers (or files) that could not be asked to the reason.
    """

    place: Place
    found: list[Found]
    bucket: Place | None
    in_bucket: list[Found]
    on_node: tuple[OnNode, ...]
    silent: dict[str, str]

    @property
    def blob_sets(self) -> list[BlobSet]:
        return [blobs for tier in self.on_node for blobs in tier.blobs.sets]


def whereabouts(text: str) -> Whereabouts:
    """Look at the PLACE `text`. Raises CheckpointError and StorageError for the place itself, not for the others."""
    place = existing_place(text)
    if place.folder is not None or not isinstance(place.store, DiskStore):
        return Whereabouts(place, survey(place), None, [], (), {})
    silent: dict[str, str] = {}
    settings = _settings(place.store, silent)
    if settings is None:
        return Whereabouts(place, survey(place), None, [], (), silent)
    found = survey(place)
    if not found and settings.checkpoint_dir is not None:
        place = Place(DiskStore(local_path(settings.checkpoint_dir, flag="--checkpoint_dir")))
        found = survey(place)
    bucket, in_bucket = _bucket(settings, silent)
    return Whereabouts(place, found, bucket, in_bucket, _on_node(place, settings, silent), silent)


def _settings(store: DiskStore, silent: dict[str, str]) -> CheckpointConfig | None:
    path = configuration_of(store)
    if path is None:
        return None
    try:
        return resolve(Layer(str(path), read_yaml(path)[0])).config.checkpoint
    except ConfigError as error:
        silent["config.yaml"] = f"{error}; the other tiers of this run are not looked at"
        return None


def _bucket(settings: CheckpointConfig, silent: dict[str, str]) -> tuple[Place | None, list[Found]]:
    if settings.s3_tier_base_path is None:
        return None, []
    try:
        bucket = Place(open_store(settings.s3_tier_base_path))
        return bucket, survey(bucket)
    except StorageError as error:
        silent["s3"] = f"{settings.s3_tier_base_path} cannot be asked: {error}"
        return None, []


def _on_node(place: Place, settings: CheckpointConfig, silent: dict[str, str]) -> tuple[OnNode, ...]:
    directories = [("memory", "--memory_tier_dir", settings.memory_tier_dir)]
    if settings.local_tier_dir is not None:
        directories.append(("local", "--local_tier_dir", settings.local_tier_dir))
    tiers = []
    for tier, flag, directory in directories:
        try:
            run = run_of(place.store)
            root = None if run is None else run_root(local_path(directory, flag=flag), run)
            blobs = NodeBlobs((), ()) if root is None or run is None else blobs_below(root, tier=tier, run=run)
            tiers.append(OnNode(tier, root, blobs))
        except StorageError as error:
            silent[tier] = str(error)
    return tuple(tiers)


def chosen(found: list[Found], where: str, step: int | None) -> Found:
    """The complete checkpoint of `step`, or the one that a resume would take first; damaged ones are named.

    Raises CheckpointError when there is none.
    """
    complete = [one for one in found if one.is_complete]
    wanted = [one for one in complete if step in (None, one.stored.step)]
    if wanted:
        for one in found[: found.index(wanted[0])] if step is None else ():
            if one.condition is Condition.DAMAGED:
                logger.warning(f"{one.stored.location} is passed over, it is damaged: {one.detail}")
        return wanted[0]
    if step is not None and complete:
        steps = ", ".join(str(one.stored.step) for one in complete)
        raise CheckpointError(f"--step={step}: {where} has steps {steps}")
    broken = [one for one in found if step in (None, one.stored.step)]
    if broken:
        raise CheckpointError(f"{broken[0].stored.location} is {broken[0].condition}: {broken[0].detail}")
    raise CheckpointError(f"{where}: found no checkpoint (a folder named step-XXXXXXXX)")


def one_checkpoint(text: str) -> StoredCheckpoint:
    """The checkpoint that `PLACE` or `PLACE@STEP` names: its only one, that step's, or the newest."""
    match = _AT_STEP.fullmatch(text)
    where, step = (match[1], int(match[2])) if match else (text, None)
    place = existing_place(where)
    if step is not None and place.folder is not None:
        raise CheckpointError(f"{text}: {where} is one checkpoint already; expected PLACE@STEP or a step's folder")
    seen = whereabouts(where)
    return chosen(seen.found, seen.place.store.location, step).stored
