"""The ranks that write one checkpoint together, and how a failure of one becomes the same error on all.

A collective that only some ranks reach hangs the job, so whatever a rank does between two of them runs inside
`together` or `on_main`, which carry the outcome, good or bad, to everyone. (Ranks of one job trust each other as
torch.distributed does: what they tell each other is pickled. Nothing from a file or another node's agent is.)
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
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
        if self.size == 1:
            result, error = _attempt(action)
            _raise_failures([self._failure(error)], error)
            return [result]  # type: ignore[list-item]
        content, error = _attempt(lambda: pickle.dumps(action()))
        outcomes = self._gather((content, self._failure(error)))
        _raise_failures([failure for _, failure in outcomes], error)
        return [pickle.loads(content) for content, _ in outcomes if content is not None]

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 does `action`; every rank gets its result, or raises what it met."""
        if self.size == 1:
            return self.together(action)[0]
        # Made bytes within the attempt: what cannot be sent must fail as any action does, on all ranks.
        content, error = _attempt(lambda: pickle.dumps(action())) if self.is_main else (None, None)
        content, failure = self._from_main((content, self._failure(error)))
        _raise_failures([failure], error)
        return pickle.loads(content)  # type: ignore[arg-type, no-any-return]

    def _failure(self, error: Exception | None) -> _Failure | None:
        if error is None:
            return None
        if isinstance(error, HypershardError):
            kinds = (kind for kind in _KINDS if isinstance(error, kind))
            return _Failure(self.rank, next(kinds, CheckpointError), str(error))
        kind = StorageError if isinstance(error, OSError) else CheckpointError
        return _Failure(self.rank, kind, f"{type(error).__name__}: {error}")

    def _gather(self, value: T) -> list[T]:
        gathered: list[T] = [value] * self.size
        with _lost_peers():
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def _from_main(self, value: T) -> T:
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


def _raise_failures(outcomes: Sequence[_Failure | None], own: Exception | None) -> None:
    failures = [failure for failure in outcomes if failure is not None]
    if not failures:
        return
    same = len({failure.text for failure in failures}) == 1
    message = failures[0].text if same else "; ".join(f"rank {failure.rank}: {failure.text}" for failure in failures)
    # The kind that says most: another model is so whatever else is wrong; damage on one rank is damage.
    kinds = {failure.kind for failure in failures}
    raise next(kind for kind in _KINDS_BY_WEIGHT if kind in kinds)(message) from own
