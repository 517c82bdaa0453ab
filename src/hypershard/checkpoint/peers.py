"""The ranks that write one checkpoint together, and how a failure of one becomes the same error on all.

A collective that only some ranks reach hangs the job, so whatever a rank does between two of them runs inside
`together` or `on_main`, which carry the outcome, good or bad, to everyone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ..errors import CheckpointError, DamagedCheckpoint, HypershardError, StorageError

T = TypeVar("T")
_KINDS: tuple[type[HypershardError], ...] = (DamagedCheckpoint, StorageError, CheckpointError)  # subclasses first
_KINDS_BY_WEIGHT: tuple[type[HypershardError], ...] = (CheckpointError, DamagedCheckpoint, StorageError)


@dataclass(frozen=True)
class _Failure:
    rank: int
    kind: type[HypershardError]
    text: str


@dataclass(frozen=True)
class Peers:
    """The ranks of `group`; None is a process alone. The group must be gloo and used for nothing but checkpoints.

    (Saving runs in a thread beside the training; on a group they share, the two would wait for each other.)
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """Every rank does `action`; every rank gets all results in rank order, or raises what any of them met."""
        result, error = _attempt(action)
        outcomes = self._gather((result, self._failure(error)))
        _raise_failures([failure for _, failure in outcomes if failure is not None], error)
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 does `action`; every rank gets its result, or raises what it met."""
        result, error = _attempt(action) if self.is_main else (None, None)
        result, failure = self._from_main((result, self._failure(error)))
        _raise_failures([failure] if failure is not None else [], error)
        return result  # type: ignore[return-value]

    def _failure(self, error: Exception | None) -> _Failure | None:
        if error is None:
            return None
        if isinstance(error, HypershardError):
            kinds = (kind for kind in _KINDS if isinstance(error, kind))
            return _Failure(self.rank, next(kinds, CheckpointError), str(error))
        kind = StorageError if isinstance(error, OSError) else CheckpointError
        return _Failure(self.rank, kind, f"{type(error).__name__}: {error}")

    def _gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        gathered: list[T] = [value] * self.size
        with _lost_peers():
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def _from_main(self, value: T) -> T:
        if self.size == 1:
            return value
        holder = [value]
        with _lost_peers():
            dist.broadcast_object_list(holder, group=self.group, group_src=0)
        return holder[0]


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    """Say plainly what gloo's RuntimeError means: another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise HypershardError(
            f"lost contact with another rank during a checkpoint: {text}", shared_by_all_ranks=False
        ) from error


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # carried to all ranks, whatever it is
        return None, error


def _raise_failures(failures: list[_Failure], own: Exception | None) -> None:
    if not failures:
        return
    same = len({failure.text for failure in failures}) == 1
    message = failures[0].text if same else "; ".join(f"rank {failure.rank}: {failure.text}" for failure in failures)
    # The kind that says most: another model is so whatever else is wrong; damage on one rank is damage.
    kinds = {failure.kind for failure in failures}
    raise next(kind for kind in _KINDS_BY_WEIGHT if kind in kinds)(message) from own
