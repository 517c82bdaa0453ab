"""Blobs in the memory that HyperPod keeps on several nodes of an EKS cluster. Needs no torch.

Clusters with managed tiered checkpointing run a daemon that holds shards by namespace, rank and step, and copies them
to other nodes. We give it our own blobs (blob.py), which prove themselves, and read nothing else from it:

    hypershard-<job>-<lineage>-<n>-ranks        what one start of the job put
        rank 0 to n-1                           blobs
        rank n to 2n-1                          their heads and tables alone, put after them
    hypershard-<job>-index                      rank 0: JSON, which starts put which steps; the highest number counts

The daemon gives whole shards only, so the tables are there a second time: finding out what it holds costs kilobytes.
A namespace per start, because the daemon drops the lowest steps: after going back from step 100 to 60 it would keep
the abandoned 100 and drop the new 70. And so no key is ever used twice, whatever overwriting may mean to a daemon that
copies beside our requests.

The daemon knows neither passwords nor encryption: whoever reaches it on the cluster's network can read, replace and
delete what it holds. Checksums tell damage, not malice: somebody who replaces a blob can sum it up anew. Use it only
where everything on that network is trusted to choose the weights; it is off unless asked for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DamagedCheckpoint, StorageError
from ..log import logger
from .blob import HEAD_BYTES, BlobTable, blob_bytes, read_table
from .hyperpod_client import STEPS_RETAINED, Namespace, OutOfReach, checked_url
from .lineage import Lineage
from .sums import Source

_MAX_RANKS = 2**20  # above any job; a damaged number must not ask for a loop without end


@dataclass(frozen=True, order=True)
class _Start:
    """What one start of the job put, or began to: the highest steps, ascending."""

    lineage: Lineage
    world_size: int
    steps: tuple[int, ...]

    @property
    def key(self) -> tuple[Lineage, int]:
        return self.lineage, self.world_size


class HyperPodMemory:
    """Blobs of `job` in HyperPod's managed memory tier.

    `url` '' means the address that AWS's client has for it in every cluster. A request takes at most
    `timeout_seconds`, and with it the time for a blob's bytes at 50 MiB/s. Raises StorageError without the package.
    Room is needed for STEPS_RETAINED steps and, until the first save of a start is whole, those of the start before.
    """

    name = "hyperpod"

    def __init__(self, job: str, *, url: str, timeout_seconds: float):
        self._job = job
        self._url = checked_url(url)
        self._timeout_seconds = timeout_seconds
        self._last_put: tuple[Lineage, int] | None = None

    def put(self, blob: memoryview | bytes, table: BlobTable) -> None:
        """Hand over a finished blob whose table is `table`; `blob` may go on behind it. Not for two threads at once.

        Rank 0 says first in the index what will come, and deletes what earlier starts put once there is something
        newer and whole. Raises StorageError; what came that far counts only if it is all there, and may be put again.
        """
        view = memoryview(blob).cast("B")
        size_bytes = blob_bytes(bytes(view[:HEAD_BYTES]))
        assert size_bytes is not None and size_bytes <= view.nbytes, "only a finished blob can be put"
        start = _Start(table.lineage, table.world_size, (table.step,))
        space = self._space(start)
        space.create()
        if table.rank == 0:
            self._announce(start)
        blob_rank, table_rank = table.rank, table.world_size + table.rank
        if self._last_put == (table.lineage, table.step):  # it failed, and may be there in part
            space.drop(table_rank, table.step)
            space.drop(blob_rank, table.step)
        self._last_put = (table.lineage, table.step)
        space.put(blob_rank, table.step, view[:size_bytes])
        about = bytes(view[:HEAD_BYTES]) + bytes(view[HEAD_BYTES + table.size_bytes : size_bytes])
        space.put(table_rank, table.step, about)

    def tables(self) -> list[BlobTable]:
        """The tables of all blobs of this job that are held, of any start and number of ranks, newest first.

        For one rank to ask and to tell the others: a small request per rank and step. A damaged table is named and
        passed over. Raises StorageError when the daemon cannot be asked, DamagedCheckpoint when its index is no index.
        """
        _, starts = self._read_index()
        return [table for start in sorted(starts, reverse=True) for table in self._tables_of(start)]

    def source(self, table: BlobTable) -> Source:
        """The bytes of a blob that `tables` found, fetched whole at the first read and kept as long as the source.

        While they arrive they take twice their size. Reading raises FileNotFoundError when the daemon has dropped
        them, DamagedCheckpoint when they do not match the daemon's checksum, else StorageError.
        """
        return _HeldBlob(self._space(_Start(table.lineage, table.world_size, ())), table)

    def forget(self) -> None:
        """Delete all that is held for this job. For one rank, after a clean end; raises as `tables` does."""
        _, starts = self._read_index()
        for start in starts:
            self._space(start).delete()
        self._index().delete()

    def _space(self, start: _Start) -> Namespace:
        lineage = _digest(f"{start.lineage.generation} {start.lineage.id}")
        name = f"hypershard-{_digest(self._job)}-{lineage}-{start.world_size}-ranks"
        return Namespace(self._url, name, 2 * start.world_size, self._timeout_seconds)

    def _index(self) -> Namespace:
        return Namespace(self._url, f"hypershard-{_digest(self._job)}-index", 1, self._timeout_seconds)

    # --- the index -------------------------------------------------------------------------------------------

    def _read_index(self) -> tuple[int, list[_Start]]:
        """The highest number used in the index, and the starts it names. Raises DamagedCheckpoint if none is whole."""
        index = self._index()
        numbers = index.latest()
        damage = []
        for number in numbers:
            try:
                content = index.get(0, number)
                if content is not None:
                    return numbers[0], _parse_index(content, self._job)
                damage.append(f"{index.name} lists number {number} and does not have it")
            except DamagedCheckpoint as error:
                damage.append(str(error))
        if damage:
            raise DamagedCheckpoint("; ".join(damage), shared_by_all_ranks=False)
        return 0, []

    def _announce(self, own: _Start) -> None:
        """Add a step to the index before its blob comes, so that nothing is held that the index does not name."""
        try:
            number, starts = self._read_index()
        except DamagedCheckpoint as error:
            logger.warning(f"{error}; a new index is begun")
            number, starts = max(self._index().latest(), default=0), []
        by_key = {start.key: start for start in starts}
        steps = {*by_key[own.key].steps, *own.steps} if own.key in by_key else set(own.steps)
        by_key[own.key] = replace(own, steps=tuple(sorted(steps)[-STEPS_RETAINED:]))
        for start in self._superseded(by_key.values()):
            self._space(start).delete()
            del by_key[start.key]
        index = self._index()
        index.create()
        index.put(0, number + 1, _index_bytes(by_key.values(), self._job))

    def _superseded(self, starts: Iterable[_Start]) -> list[_Start]:
        """The starts of timelines before the newest one of which a step is whole."""
        ordered = sorted(starts, reverse=True)
        if len(ordered) == 1:
            return []
        for start in ordered:
            if _has_whole_step(self._tables_of(start)):
                return [other for other in ordered if other.lineage < start.lineage]
        return []

    # --- tables ----------------------------------------------------------------------------------------------

    def _tables_of(self, start: _Start) -> list[BlobTable]:
        found = []
        for step in reversed(start.steps):
            for rank in range(start.world_size):
                table = self._table(start, step, rank)
                if table is not None:
                    found.append(table)
        return found

    def _table(self, start: _Start, step: int, rank: int) -> BlobTable | None:
        space = self._space(start)
        try:
            content = space.get(start.world_size + rank, step)
            table = None if content is None else read_table(_WithoutPayload(f"{space.name} step {step}", content))
        except OutOfReach:
            raise
        except (StorageError, DamagedCheckpoint) as error:
            logger.warning(f"{error}; it is passed over")
            return None
        if table is None:
            return None
        found = (table.job, table.lineage, table.world_size, table.step, table.rank)
        if found != (self._job, *start.key, step, rank):
            logger.warning(f"{space.name}: found another blob where step {step} of rank {rank} was expected")
            return None
        return table


def _digest(text: str) -> str:
    """Any text as part of a name: the client puts names into URLs as they are."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _has_whole_step(tables: Sequence[BlobTable]) -> bool:
    parts: dict[int, set[int]] = {}
    for table in tables:
        parts.setdefault(table.step, set()).add(table.part)
    return any(parts[table.step] >= set(range(table.num_parts)) for table in tables)


def _index_bytes(starts: Iterable[_Start], job: str) -> bytes:
    value = [
        {
            "generation": start.lineage.generation,
            "id": start.lineage.id,
            "world_size": start.world_size,
            "steps": start.steps,
        }
        for start in sorted(starts)
    ]
    return json.dumps({"job": job, "starts": value}).encode()


def _parse_index(content: bytes, job: str) -> list[_Start]:
    """Raises DamagedCheckpoint when it is not this job's index."""
    try:
        value: Mapping[str, Any] = json.loads(content)
        if value["job"] != job:
            raise ValueError(f"found job {value['job']!r}, expected {job!r}")
        starts = [_parse_start(start) for start in value["starts"]]
    except (ValueError, KeyError, TypeError) as error:
        text = f"the index of {job} in HyperPod's memory is not one of this version: {error}"
        raise DamagedCheckpoint(text, shared_by_all_ranks=False) from error
    return starts


def _parse_start(value: Mapping[str, Any]) -> _Start:
    world_size, steps = int(value["world_size"]), tuple(sorted(int(step) for step in value["steps"]))
    if not 0 < world_size <= _MAX_RANKS or len(steps) > STEPS_RETAINED:
        raise ValueError(f"{world_size} ranks and {len(steps)} steps")
    return _Start(Lineage(int(value["generation"]), str(value["id"])), world_size, steps)


@dataclass(frozen=True)
class _WithoutPayload:
    """A blob's head and table, the table where the head says that it is."""

    name: str
    content: bytes
    parallel_reads: int = 1

    def read(self, offset: int, size_bytes: int) -> bytes:
        begin = min(offset, HEAD_BYTES)  # all that is asked for behind the head is the table
        return self.content[begin : begin + size_bytes]


class _HeldBlob:
    """A blob in the daemon as a `sums.Source`."""

    parallel_reads = 2  # one is summed up while another is copied

    def __init__(self, space: Namespace, table: BlobTable):
        self.name = f"step {table.step} of rank {table.rank} in HyperPod's memory ({space.name})"
        self._space = space
        self._table = table
        self._content: memoryview | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, size_bytes: int) -> memoryview:
        with self._lock:
            if self._content is None:
                self._content = self._fetch()
        return self._content[offset : offset + size_bytes]

    def _fetch(self) -> memoryview:
        table = self._table
        content = self._space.get(table.rank, table.step, size_bytes=HEAD_BYTES + table.size_bytes)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, "the daemon has dropped it", self.name)
        return memoryview(content)
