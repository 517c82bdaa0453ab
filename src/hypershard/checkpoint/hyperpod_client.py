"""One namespace of HyperPod's memory daemon, by way of AWS's client for it. Needs no torch.

The package's other half, its checkpoint writer and reader, is never imported. Four of the client's ways are mended
here: its time-out is one number for everything, it writes to logs of its own, it answers "none" when it could not ask
for the latest steps, and its messages leave out what happened.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DamagedCheckpoint, StorageError

FLAG = "--hyperpod_memory_url"
# The daemon drops a namespace's lowest steps beyond these: one whole, one that failed halfway, one being put.
STEPS_RETAINED = 3
_CONNECT_SECONDS = 5.0  # within one cluster; also the longest that sending one piece of a body may stand still
# A rank's share of a slow day: eight ranks of a node together need 3 Gbit/s, its network has 25 and more.
_SLOWEST_BYTES_PER_SECOND = 50 * 2**20
_PIECE_BYTES = 4 * 2**20
_TRIES = 2  # of reading; what is put comes again with the next save
_PAUSE_SECONDS = 0.5
_MAX_SAID = 200  # characters of an answer that are quoted
_SILENT = logging.Logger("hyperpod")  # belongs to no tree of loggers, so nothing is printed or written
_SILENT.disabled = True

T = TypeVar("T")


class OutOfReach(StorageError):
    """No connection, or no answer in time: asking for the next thing would take as long again."""


class _Absent(StorageError):
    """The daemon answers that there is no such thing."""


class _Nonsense(StorageError):
    """An answer that does not match its checksum, or is not what was asked for."""


def checked_url(url: str) -> str:
    """`url` without a closing slash; for '' the address that AWS's client has for the service of every cluster.

    Raises StorageError for what is no http URL, for one with a password in it, and when the package is missing.
    """
    try:
        from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig
        from amzn_sagemaker_checkpointing.storage.clients.inmemory import inmemory_client  # noqa: F401
    except ImportError as error:
        raise StorageError(
            f"HyperPod's memory needs the package {error.name}; found none: pip install 'hypershard[hyperpod]'"
        ) from error
    url = url or InMemoryClientConfig().base_url
    try:
        parts = urllib.parse.urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        is_valid = False
    if not is_valid or "@" in url or "?" in url or "#" in url:
        shown = url.rsplit("@", 1)[-1].split("?", 1)[0]
        raise StorageError(f"{FLAG}: found {shown!r}, expected http://host:port without a user or password")
    return url.rstrip("/")


class Body:
    """A blob as the client takes it: like a file, and without a copy of the bytes.

    Plain bytes would have to be sent, all of them, within the time for connecting: so the socket is set while it
    sends. Of a file each piece has that time. The pieces are larger than what is asked for, 8 and 16 KiB, because
    summing up and sending millions of those would keep Python's lock from the training.
    """

    def __init__(self, content: memoryview | bytes, *, deadline: float):
        self._view = memoryview(content).cast("B")
        self._deadline = deadline
        self._at = 0

    def __len__(self) -> int:
        return self._view.nbytes

    def read(self, _size: int = -1) -> memoryview:
        if time.monotonic() > self._deadline:
            raise TimeoutError("sending took too long")
        piece = self._view[self._at : self._at + _PIECE_BYTES]
        self._at += piece.nbytes
        return piece

    def seek(self, position: int) -> int:
        self._at = position
        return position

    def tell(self) -> int:
        return self._at


@dataclass(frozen=True)
class Namespace:
    """Shards by (rank, step) under one name: ranks 0 to num_ranks - 1, and the STEPS_RETAINED highest steps.

    Every method asks once, reading ones twice, and ends within `timeout_seconds` (for a shard: and the time that its
    bytes take at 50 MiB/s) per try. All raise OutOfReach or another StorageError. Nothing answered is ever unpickled.
    """

    url: str
    name: str
    num_ranks: int
    timeout_seconds: float

    def create(self) -> None:
        """Have it made unless it is there. Raises StorageError when it is there for another number of ranks."""

        def make(client: Any, seconds: tuple[float, float]) -> Any:
            return client.get_or_create_namespace(timeout=seconds)

        try:
            found = self._ask("creating", make)
        except OutOfReach:
            raise
        except StorageError:
            # Between the client's look and its request another rank may have had it made.
            found = self._ask("looking for", lambda client, seconds: client.get_namespace_config(timeout=seconds))
            if not found:
                raise
        num_ranks = found.get("num_ranks", self.num_ranks) if isinstance(found, dict) else self.num_ranks
        if num_ranks != self.num_ranks:
            raise StorageError(
                f"{self._place()} has room for {num_ranks!r} ranks, expected {self.num_ranks}",
                shared_by_all_ranks=False,
            )

    def put(self, rank: int, step: int, content: memoryview | bytes) -> None:
        """Hand over one shard. Whether the daemon overwrites is not documented: delete what was there before."""
        size_bytes = memoryview(content).nbytes

        def put(client: Any, seconds: tuple[float, float]) -> None:
            body = Body(content, deadline=time.monotonic() + seconds[1])
            client.put_checkpoint(step, body, rank=rank, timeout=seconds)

        self._ask(f"putting shard {rank} of step {step} into", put, size_bytes=size_bytes)

    def get(self, rank: int, step: int, *, size_bytes: int = 0) -> bytes | None:
        """One shard of about `size_bytes`, or None when there is none.

        Raises DamagedCheckpoint when it arrives twice with bytes that do not match the daemon's checksum.
        """

        def get(client: Any, seconds: tuple[float, float]) -> bytes | None:
            return client.get_checkpoint(step, rank=rank, timeout=seconds)

        try:
            return self._ask_twice(f"reading shard {rank} of step {step} from", get, size_bytes=size_bytes)
        except _Nonsense as error:
            raise DamagedCheckpoint(str(error), shared_by_all_ranks=False) from error

    def latest(self) -> list[int]:
        """The highest steps, descending; [] without such a namespace. The client's own method hides every error."""
        import requests
        from amzn_sagemaker_checkpointing.storage.clients.inmemory.inmemory_client import InMemoryCheckpointClient

        path = InMemoryCheckpointClient.LATEST_CHECKPOINTS_PATH.format(namespace=self.name)

        def ask(_client: Any, seconds: tuple[float, float]) -> list[int]:
            answer = requests.get(self.url + path, params={"limit": STEPS_RETAINED}, timeout=seconds)
            if answer.status_code == 404:
                return []
            answer.raise_for_status()
            return sorted((int(step) for step in answer.json()), reverse=True)

        return self._ask_twice("listing", ask)

    def drop(self, rank: int, step: int) -> None:
        """Delete one shard; being gone already is fine."""

        def drop(client: Any, seconds: tuple[float, float]) -> None:
            client.delete_checkpoint(step, rank=rank, timeout=seconds)

        with contextlib.suppress(_Absent):
            self._ask(f"deleting shard {rank} of step {step} from", drop)

    def delete(self) -> None:
        """Delete it with all it holds; being gone already is fine."""
        with contextlib.suppress(_Absent):
            self._ask("deleting", lambda client, seconds: client.delete_namespace(timeout=seconds))

    def _place(self) -> str:
        return f"{self.name} in HyperPod's memory at {self.url}"

    def _ask_twice(self, doing: str, action: Callable[[Any, tuple[float, float]], T], *, size_bytes: int = 0) -> T:
        """A daemon that lost a node answers with errors for a moment, and that is when a restore asks."""
        for _ in range(_TRIES - 1):
            try:
                return self._ask(doing, action, size_bytes=size_bytes)
            except OutOfReach:
                raise
            except StorageError:
                time.sleep(_PAUSE_SECONDS)
        return self._ask(doing, action, size_bytes=size_bytes)

    def _ask(self, doing: str, action: Callable[[Any, tuple[float, float]], T], *, size_bytes: int = 0) -> T:
        """Run `action(client, (connect, read) time-outs)`; a new connection each time, so no time-out is left over."""
        seconds = self.timeout_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND

        def run() -> T:
            with contextlib.closing(self._client()) as client:
                return action(client, (min(_CONNECT_SECONDS, self.timeout_seconds), seconds))

        try:
            return _within(seconds, run)
        except Exception as error:  # the client lets its libraries' errors through, KeyError among them
            raise _readable(error, f"{doing} {self._place()}") from error

    def _client(self) -> Any:
        from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig
        from amzn_sagemaker_checkpointing.storage.clients.inmemory.inmemory_client import InMemoryCheckpointClient

        return InMemoryCheckpointClient(
            self.name,
            "0",
            str(self.num_ranks),
            config=InMemoryClientConfig(base_url=self.url, request_retries=0, log_requests=False),
            metadata_file_count=0,
            steps_retained=STEPS_RETAINED,
            logger=_SILENT,
        )


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What `action` returns. Its own time-outs are for each piece received, so one that trickles is left behind."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # raised again where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="hyperpod", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome.done():
        raise TimeoutError(f"not done within {seconds:.3g} seconds")
    return outcome.result()


def _readable(error: Exception, doing: str) -> StorageError:
    import requests
    from amzn_sagemaker_checkpointing.storage.clients.inmemory import exceptions as client_errors

    if isinstance(error, client_errors.InMemoryNameSpaceCreateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = f"{doing}: {_root_text(error)}"
    out_of_reach = (
        client_errors.InMemoryConnectionError,
        client_errors.InMemoryTimeoutError,
        requests.ConnectionError,
        requests.Timeout,
        TimeoutError,
    )
    if isinstance(error, out_of_reach):
        hint = f"is managed tiered checkpointing on in this cluster, and {FLAG} its address?"
        return OutOfReach(f"{text}; {hint}", shared_by_all_ranks=False)
    if isinstance(error, client_errors.InMemoryResourceNotFoundError):
        return _Absent(text, shared_by_all_ranks=False)
    # The client says "checksum mismatch" by its base class, and stumbles over a header that is missing or no JSON.
    if type(error) is client_errors.InMemoryStorageError or isinstance(error, ValueError | KeyError | TypeError):
        return _Nonsense(text, shared_by_all_ranks=False)
    return StorageError(text, shared_by_all_ranks=False)


def _root_text(error: BaseException) -> str:
    """What happened in the first place, on one line: the errors around it name only the layers it went through."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:_MAX_SAID]}"
