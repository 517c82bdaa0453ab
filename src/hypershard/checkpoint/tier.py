"""What a place for checkpoints must do; disk, bucket and memory stand behind the same methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .lineage import NO_LINEAGE, Lineage

if TYPE_CHECKING:
    import torch

    from .peers import Peers


@dataclass(frozen=True)
class CheckpointRecord:
    """One complete checkpoint: its step, where it lies (a path or URI), and the timeline it belongs to.

    `attempt` counts saves of the same step in the same place.
    """

    step: int
    location: str
    attempt: int = 1
    lineage: Lineage = NO_LINEAGE


class Tier(Protocol):
    """A place to restore from. All methods are collective: every rank of `peers` calls them in the same order.

    What fails on one rank is raised by all. A checkpoint exists from the moment it is whole.
    """

    @property
    def name(self) -> str: ...

    @property
    def peers(self) -> Peers: ...

    def list(self) -> list[CheckpointRecord]:
        """Complete checkpoints, newest first. Raises StorageError when the place cannot be asked."""

    def lineages(self) -> set[Lineage]:
        """All timelines that the last `list` saw, also of what is not whole."""

    def verify(self, record: CheckpointRecord) -> None:
        """Raise DamagedCheckpoint, naming the file and what is wrong, unless every byte is as saved."""

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place and return the facts.

        Raises DamagedCheckpoint or StorageError when what is needed is not as saved or cannot be read: the tensors
        then hold a mixture, to be filled again from elsewhere. Raises CheckpointError for another model's checkpoint.
        """

    def delete(self, record: CheckpointRecord) -> None:
        """Remove a checkpoint so that at no moment half of it passes for whole."""
