"""`hypershard checkpoint list`: one line for everything that was saved, wherever it lies."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ..checkpoint.node_blobs import BlobSet
from ..checkpoint.survey import Condition, Found
from ..errors import CheckpointError, DamagedCheckpoint
from ..units import format_bytes
from .checkpoint_list_adapters import AdapterRow, checkpoint_row, folder_row, is_adapter_folder
from .checkpoint_places import Whereabouts, whereabouts

_TIERS = ("memory", "local", "disk", "s3")  # in the order of a resume when all have the same step


@dataclass(frozen=True)
class Row:
    """One checkpoint; `start` counts the starts of the run, None where it is not known."""

    tier: str
    location: str
    step: int
    attempt: int
    saved_at: str | None
    size_bytes: int
    num_ranks: int | None
    start: int | None
    lineage_id: str | None
    torch_version: str | None
    state: str
    detail: str


def list_checkpoints(place: str, *, as_json: bool) -> int:
    """Print what lies in `place`. Raises CheckpointError when that is nothing."""
    if is_adapter_folder(place):
        folder = folder_row(place)
        print(json.dumps({"adapters": dataclasses.asdict(folder)}, indent=1) if as_json else folder.shown())
        return 0
    seen = whereabouts(place)
    stored = seen.stored
    rows = sorted(_rows(seen), key=_order, reverse=True)
    damage = [text for tier in seen.on_node for text in tier.blobs.damage]
    try:
        adapters = _adapters(seen)
    except DamagedCheckpoint as error:
        adapters = None
        damage.append(str(error))
    if not (rows or damage):
        silent = "".join(f"; {text}" for text in seen.silent.values())
        raise CheckpointError(f"{stored.location}: found no checkpoint (a folder named step-XXXXXXXX){silent}")
    if as_json:
        value = {
            "places": _places(seen),
            "checkpoints": [dataclasses.asdict(row) for row in rows],
            "damaged": damage,
            "silent": seen.silent,
            "adapters": None if adapters is None else dataclasses.asdict(adapters),
        }
        print(json.dumps(value, indent=1))
        return 0
    print(_line("tier", "step", "saved", "size", "ranks", "start", "torch", "state"))
    for row in rows:
        print(_shown(row))
    print()
    on_node = {tier.tier for tier in seen.on_node}
    for tier, location in _places(seen).items():
        print(f"{tier:<7} {location}" + (" (this node)" if tier in on_node else ""))
    if adapters is not None:
        print(adapters.shown())
    for text in damage:
        print(f"damaged {text}")
    for text in seen.silent.values():
        print(f"silent  {text}")
    return 0


def _adapters(seen: Whereabouts) -> AdapterRow | None:
    """Of the newest complete checkpoint."""
    complete = [found for found in (*seen.stored.found, *seen.in_bucket) if found.is_complete]
    newest = max(complete, key=lambda found: _order(_stored_row(found)), default=None)
    return None if newest is None else checkpoint_row(newest.stored, size_bytes=newest.size_bytes)


def _rows(seen: Whereabouts) -> list[Row]:
    stored = [_stored_row(found) for found in (*seen.stored.found, *seen.in_bucket)]
    return stored + [_blob_row(blobs) for blobs in seen.blob_sets]


def _stored_row(found: Found) -> Row:
    stored, manifest = found.stored, found.manifest
    return Row(
        tier=stored.store.name,
        location=stored.location,
        step=stored.step,
        attempt=stored.attempt,
        saved_at=manifest.saved_at if manifest else None,
        size_bytes=found.size_bytes,
        num_ranks=manifest.world_size if manifest else None,
        start=manifest.lineage.generation if manifest else None,
        lineage_id=manifest.lineage.id if manifest else None,
        torch_version=manifest.torch_version if manifest else None,
        state=str(found.condition),
        detail=found.detail,
    )


def _blob_row(blobs: BlobSet) -> Row:
    num_here = len(blobs.parts)
    return Row(
        tier=blobs.tier,
        location=str(blobs.blobs[0].path.parents[2]),
        step=blobs.step,
        attempt=1,
        saved_at=blobs.saved_at,
        size_bytes=blobs.size_bytes,
        num_ranks=blobs.blobs[0].table.world_size,
        start=blobs.lineage.generation,
        lineage_id=blobs.lineage.id,
        torch_version=None,
        state=str(Condition.COMPLETE) if blobs.is_whole else "partial",
        detail="" if blobs.is_whole else f"{num_here} of {blobs.num_parts} parts on this node",
    )


def _order(row: Row) -> tuple[bool, int, int, int, int]:
    """As a resume would look at them: the latest start first, then the step, then the nearest tier."""
    return row.start is None, row.start or 0, row.step, -_TIERS.index(row.tier), row.attempt


def _places(seen: Whereabouts) -> dict[str, str]:
    places = {tier.tier: str(tier.root) for tier in seen.on_node if tier.root is not None}
    places[seen.stored.place.store.name] = seen.stored.location
    if seen.bucket is not None:
        places[seen.bucket.store.name] = seen.bucket.store.location
    return places


def _shown(row: Row) -> str:
    step = f"{row.step}" + (f".{row.attempt}" if row.attempt > 1 else "")
    state = f"{row.state}: {row.detail}" if row.detail else row.state
    size = format_bytes(row.size_bytes)
    return _line(row.tier, step, _when(row.saved_at), size, row.num_ranks, row.start, row.torch_version, state)


def _when(saved_at: str | None) -> str | None:
    return None if saved_at is None else saved_at.replace("T", " ").removesuffix("+00:00") + " UTC"


def _line(*cells: object) -> str:
    tier, step, saved, size, ranks, start, torch_version, state = ("-" if cell is None else str(cell) for cell in cells)
    return f"{tier:<6}  {step:>8}  {saved:<23}  {size:>10}  {ranks:>5}  {start:>5}  {torch_version:<12}  {state}"
