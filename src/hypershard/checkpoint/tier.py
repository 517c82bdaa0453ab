"""What a place for checkpoints must do. Local disk is one; memory and S3 are others behind the same methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from .peers import Peers
    from .snapshot import Snapshot


@dataclass(frozen=True)
class CheckpointRecord:
    """One complete checkpoint: its step and where it lies (a path or URI). `attempt` counts saves of the same step."""

    step: int
    location: str
    attempt: int = 1


class Tier(Protocol):
    """A place for checkpoints. All methods are collective: every rank of `peers` calls them in the same order.

    What fails on one rank is raised by all. A checkpoint exists from the moment its manifest does.
    """

    @property
    def name(self) -> str: ...

    @property
    def peers(self) -> Peers: ...

    def at(self, location: Path) -> Tier:
        """The same kind of tier at another place (to go on from somebody else's checkpoints)."""

    def probe(self) -> None:
        """Raise StorageError unless every rank can use this place for one common checkpoint."""

    def save(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any]) -> CheckpointRecord:
        """Write a checkpoint. Raises StorageError or CheckpointError and leaves older checkpoints as they were."""

    def list(self) -> list[CheckpointRecord]:
        """Complete checkpoints, newest first."""

    def verify(self, record: CheckpointRecord) -> None:
        """Raise CheckpointError, naming the file and what is wrong with it, unless every byte is as saved."""

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place and return the facts. Raises CheckpointError for another model's checkpoint."""

    def delete(self, record: CheckpointRecord) -> None:
        """Remove a checkpoint, manifest first."""
