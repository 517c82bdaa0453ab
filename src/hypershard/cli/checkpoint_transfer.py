"""`hypershard checkpoint verify` and `copy`: reading every byte, here or on its way elsewhere."""

from __future__ import annotations

import time

from ..checkpoint.node_blobs import Blob, BlobSet
from ..checkpoint.stores import Store
from ..checkpoint.survey import Found
from ..checkpoint.transfer import (
    Progress,
    copy_belongings,
    copy_checkpoint,
    damage_in,
    destination_store,
    existing_at,
)
from ..errors import CheckpointError
from ..units import format_bytes, format_seconds
from .checkpoint_places import Stored, chosen, on_this_node, stored_at, whereabouts
from .progress import shown_bytes

_VALID = "valid"


def verify(place: str, *, step: int | None) -> int:
    """Print one line per checkpoint and save on this node; 0 when all are valid.

    Raises CheckpointError when one is damaged, StorageError when a place cannot be read.
    """
    seen = whereabouts(place)
    found = [one for one in (*seen.stored.found, *seen.in_bucket) if step in (None, one.stored.step)]
    finished = [one for one in found if one.stored.is_finished]
    blob_sets = [blobs for blobs in seen.blob_sets if step in (None, blobs.step)]
    lost = [text for tier in seen.on_node for text in tier.blobs.damage] if step is None else []
    if not (finished or blob_sets or lost):
        chosen(seen.stored, step)  # says what is there instead
    outcomes = [_verify_stored(one) for one in finished] + [_verify_blobs(blobs) for blobs in blob_sets]
    for text in lost:
        print(f"damaged: {text}")
    for text in seen.silent.values():
        print(f"not verified: {text}")
    num_damaged = outcomes.count(False) + len(lost)
    if num_damaged:
        raise CheckpointError(f"{num_damaged} of {len(outcomes) + len(lost)} checkpoints are damaged")
    return 0


def _verify_stored(found: Found) -> bool:
    stored, manifest = found.stored, found.manifest
    damage = [found.detail]
    if manifest is not None:
        with shown_bytes(manifest.size_bytes, f"step {stored.step}") as show:
            damage = damage_in(stored, manifest, Progress(show))
        if not damage:
            from ..checkpoint.metadata import read_metadata

            try:
                read_metadata(stored, manifest)
                stored.facts(manifest)
            except CheckpointError as error:
                damage = [str(error)]
    print(f"{stored.location}: {'; '.join(damage) or _VALID} ({format_bytes(found.size_bytes)})")
    return not damage


def _verify_blobs(blobs: BlobSet) -> bool:
    with shown_bytes(sum(blob.table.size_bytes for blob in blobs.blobs), blobs.name) as show:
        progress = Progress(show)
        damage = [text for blob in blobs.blobs if (text := _damage_of_blob(blob, progress))]
    parts = f"{len(blobs.parts)} of {blobs.num_parts} parts on this node, {format_bytes(blobs.size_bytes)}"
    print(f"{blobs.name}: {'; '.join(damage) or _VALID} ({parts})")
    return not damage


def _damage_of_blob(blob: Blob, progress: Progress) -> str | None:
    damage = blob.damage(progress.following(blob.source))
    # A running job writes its slots anew, and deletes files: what is gone cannot be damaged.
    return damage if damage and blob.is_still_there() else None


def copy(place: str, destination: str, *, step: int | None, tier: str | None) -> int:
    """Copy one checkpoint and what lies beside it, and print what was done. Raises CheckpointError and StorageError."""
    started_at = time.monotonic()
    source = stored_at(place)
    target = destination_store(destination)
    if tier is None:
        text = _copy_stored(chosen(source, step), target)
    else:
        text = _copy_blobs(whole_set(source, tier, step), target)
    if also := copy_belongings(source.place, target):
        text += f"; with it {', '.join(also)}"
    print(f"{text}; {format_seconds(time.monotonic() - started_at)}")
    return 0


def _copy_stored(found: Found, target: Store) -> str:
    stored, manifest = found.stored, found.manifest
    assert manifest is not None, "complete ones have a manifest"
    if stored.store.location == target.location:
        raise CheckpointError(f"DESTINATION {target.location} is where the checkpoint lies; expected another place")
    if same := existing_at(target, manifest.step, lambda other: other == manifest):
        return f"{same.location} is there already, the same by its manifest and sizes; nothing copied"
    with shown_bytes(manifest.size_bytes, "copying") as show:
        copied = copy_checkpoint(stored, manifest, target, Progress(show))
    return (
        f"copied {stored.location} to {copied.location}: {len(manifest.files)} files, "
        f"{format_bytes(manifest.size_bytes)} and the manifest"
    )


def whole_set(source: Stored, tier: str, step: int | None) -> BlobSet:
    """The newest blobs of a tier on this node (of `step`) that make a checkpoint. Raises CheckpointError."""
    silent: dict[str, str] = {}
    here = [blobs for one in on_this_node(source, silent) if one.tier == tier for blobs in one.blobs.sets]
    sets = [blobs for blobs in here if step in (None, blobs.step)]
    for blobs in sets:
        if blobs.is_whole:
            return blobs
    where = f"--from {tier}" + ("" if step is None else f" --step {step}")
    if sets:
        found = f"{len(sets[0].parts)} of {sets[0].num_parts} parts of step {sets[0].step} on this node"
    else:
        found = silent.get(tier) or source.trouble or "no blob of this run on this node"
    raise CheckpointError(f"{where}: found {found}; expected a run directory all of whose parts are here")


def _copy_blobs(blobs: BlobSet, target: Store) -> str:
    from ..checkpoint.assemble import assemble

    if same := existing_at(target, blobs.step, lambda other: other.lineage == blobs.lineage):
        return f"{same.location} is there already, of the same start and step; nothing copied"
    with shown_bytes(2 * blobs.size_bytes, "copying") as show:
        copied = assemble(blobs, target, Progress(show))
    size_bytes = format_bytes(sum(copied.files.values()))
    return f"copied {blobs.name} to {copied.location}: {len(copied.files)} files, {size_bytes}"
