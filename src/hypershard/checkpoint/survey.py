"""What lies in a place, told from names and sizes alone: whole, unfinished or damaged. Needs no torch."""

from __future__ import annotations

import enum
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import CheckpointError
from .lineage import UNREADABLE, Lineage
from .manifest import Manifest, Place, StoredCheckpoint
from .policy import steps_to_delete

_MANIFESTS_AT_ONCE = 8  # they are small, and from a bucket each one is a request


class Condition(enum.StrEnum):
    COMPLETE = "complete"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Found:
    """A stored checkpoint and what its names and sizes tell. `manifest` is None when there is none that makes sense."""

    stored: StoredCheckpoint
    manifest: Manifest | None
    condition: Condition
    detail: str = ""

    @property
    def is_complete(self) -> bool:
        return self.condition is Condition.COMPLETE

    @property
    def lineage(self) -> Lineage:
        return UNREADABLE if self.manifest is None else self.manifest.lineage

    @property
    def size_bytes(self) -> int:
        """What it takes up, by the listing."""
        return sum(self.stored.files.values())

    @property
    def order(self) -> tuple[Lineage, int, int]:
        """The greatest is what a resume takes first."""
        return self.lineage, self.stored.step, self.stored.attempt


def survey(place: Place) -> list[Found]:
    """Everything that lies in `place`, in the order in which a resume would look at it.

    Raises StorageError when the place cannot be asked.
    """
    stored = place.stored()
    with ThreadPoolExecutor(_MANIFESTS_AT_ONCE) as pool:
        return sorted(pool.map(look_at, stored), key=lambda found: found.order, reverse=True)


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a run, the step after which it was measured, and whether that is still there."""

    loss: float
    step: int
    is_kept: bool


def best_of(found: list[Found]) -> Best | None:
    """What the newest complete checkpoint of `found`, in the order of `survey`, says of the run's validations.

    None where it says nothing, or there is none. Raises DamagedCheckpoint.
    """
    complete = [one for one in found if one.is_complete]
    if not complete:
        return None
    newest = complete[0].stored
    best = newest.facts(newest.manifest()).get("best")
    if best is None:
        return None
    return Best(best["loss"], best["step"], any(one.stored.step == best["step"] for one in complete))


def look_at(stored: StoredCheckpoint) -> Found:
    """Compare the sizes of the files of one checkpoint with its manifest."""
    if not stored.is_finished:
        return Found(stored, None, Condition.UNFINISHED, "being written now, or cut off; a resume never takes it")
    try:
        manifest = stored.manifest()
    except CheckpointError as error:
        return Found(stored, None, Condition.DAMAGED, str(error))
    wrong = [text for name in manifest.files if (text := stored.wrong_size(manifest, name))]
    return Found(stored, manifest, Condition.DAMAGED if wrong else Condition.COMPLETE, wrong[0] if wrong else "")


@dataclass(frozen=True)
class Superfluous:
    """A checkpoint that may go, and why."""

    found: Found
    reason: str


def superfluous(
    found: list[Found], *, keep: int, keep_every: int | None, with_broken: bool = False
) -> list[Superfluous]:
    """What may be deleted so that the `keep` newest complete checkpoints stay, and multiples of `keep_every` steps.

    The same rule as in training: of several saves of a step the last one counts, and steps that the run went back
    behind (later than the newest of its last start) go. `with_broken` adds unfinished and damaged ones. Oldest first.
    """
    complete = sorted((one for one in found if one.is_complete), key=lambda one: one.order, reverse=True)
    best: dict[int, Found] = {}
    for one in complete:
        best.setdefault(one.stored.step, one)
    newest = complete[0].stored.step if complete else 0
    old = set(steps_to_delete((step for step in best if step <= newest), keep=keep, keep_every=keep_every))
    gone = []
    for one in complete:
        step = one.stored.step
        if one is not best[step]:
            gone.append(Superfluous(one, f"step {step} was saved again"))
        elif step > newest:
            gone.append(Superfluous(one, f"abandoned: the run went back behind it and is at step {newest}"))
        elif step in old:
            gone.append(Superfluous(one, f"{keep} newer ones are kept"))
    if with_broken:
        gone += [Superfluous(one, str(one.condition)) for one in found if not one.is_complete]
    return sorted(gone, key=lambda one: (one.found.stored.step, one.found.stored.attempt))
