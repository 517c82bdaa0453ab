"""The agent of a node: keeps copies of other nodes' blobs in this node's memory, and hands out what is held here.

    python -m hypershard.checkpoint.agent      settings: one line of JSON on standard input; says "ready" and detaches

One process per node, without torch. It holds nothing but files, so it may be killed at any time and replaced. It
shares the life of the process it was told to watch, the job's launcher: trainers die and are started anew, and what
they saved must be here then. Therefore it has a session of its own and ignores the signals by which schedulers tell
the processes of a job to stop; when the launcher is gone it finishes the writes under way and goes too.

Requests and their answers are in `AgentClient`; how they travel, and who may ask, is in wire.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import resource
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypershard

from ..errors import HypershardError, StorageError
from ..log import logger
from .agent_client import ADDRESS_FILE, LOCK_FILE, LOCK_SECONDS, LOG_FILE, AgentAddress, AgentClient, read_address
from .blob import HEAD_BYTES, blob_bytes, read_table
from .copies import Offer, OpenBlob, choose_slot, held_blobs, open_blob, receive, reserve
from .wire import IDLE_SECONDS, Wire, WireClosed, WireError, admit

FINISH_SECONDS = 5.0  # for writes under way when the job ends
_KEEP_SECONDS = 15.0  # an idle connection; a new one costs a millisecond
_MAX_CONNECTIONS = 512
_MAX_STRANGERS = 32  # connections that have not shown yet that they know the token
_LOG_BYTES = 2**18
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Settings:
    """Where blobs lie ("memory", perhaps "disk"), the one address to listen on, and the process to live with."""

    roots: Mapping[str, Path]
    host: str
    watch_pid: int
    timeout_seconds: float = IDLE_SECONDS

    @staticmethod
    def from_json(line: bytes) -> Settings:
        """Raises ValueError, KeyError or TypeError when `line` holds no settings."""
        value = json.loads(line)
        roots = {name: Path(path).resolve() for name, path in value["roots"].items() if path is not None}
        timeout_seconds = float(value.get("timeout_seconds", IDLE_SECONDS))
        return Settings(roots, str(value["host"]), int(value["watch_pid"]), timeout_seconds)


def _listen(host: str, former: AgentAddress | None) -> tuple[str, socket.socket]:
    """A token and a listener: those of an agent that was killed, so that other nodes reach this one as they did it."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    if former is not None and former.host == host:
        with contextlib.suppress(OSError):  # somebody else has the port by now
            listener = socket.create_server((host, former.port), family=family, backlog=_MAX_CONNECTIONS)
            return former.token, listener
    return secrets.token_hex(32), socket.create_server((host, 0), family=family, backlog=_MAX_CONNECTIONS)


class Agent:
    """Listens, one thread per connection, until `stop` is asked for or the watched process is gone."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._memory = settings.roots["memory"]
        self._watched = os.pidfd_open(settings.watch_pid)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()  # for the four below
        self._num_connections = self._num_strangers = self._num_writes = 0
        self._ending = ""
        self._of_rank: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._clients: dict[AgentAddress, AgentClient] = {}
        self._handlers = {
            "ping": self._ping,
            "watch": self._watch,
            "reserve": self._reserve,
            "put": self._put,
            "replicate": self._replicate,
            "list": self._list,
            "read": self._read,
            "stop": self._stop,
        }
        self._token, self._listener = _listen(settings.host, read_address(self._memory))
        self._listener.settimeout(0)

    def announce(self) -> None:
        """Write the address for this user's processes; whole or not there."""
        port = self._listener.getsockname()[1]
        address = {"pid": os.getpid(), "host": self._settings.host, "port": port, "token": self._token}
        path = self._memory / ADDRESS_FILE
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({**address, "version": hypershard.__version__}, file)
        temporary.replace(path)
        logger.info(f"process {os.getpid()} listens on {self._settings.host}:{port}")

    def run(self) -> None:
        while not self._ending:
            watched = self._watched
            poll = select.poll()
            poll.register(self._wake_read, select.POLLIN)
            poll.register(watched, select.POLLIN)
            if self._num_connections < _MAX_CONNECTIONS and self._num_strangers < _MAX_STRANGERS:
                poll.register(self._listener, select.POLLIN)
            for descriptor, _ in poll.poll():
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                elif descriptor == self._listener.fileno():
                    self._accept()
                else:
                    self._end_after(watched)
        self._finish()

    def _end_after(self, gone: int) -> None:
        with self._lock:  # so that a `watch` comes either before, and this is not the end, or after, and is refused
            if gone == self._watched:
                self._ending = "the process that was watched is gone"

    def _finish(self) -> None:
        """Be found by nobody new, and let writes under way come to their end."""
        self._listener.close()
        (self._memory / ADDRESS_FILE).unlink(missing_ok=True)
        deadline = time.monotonic() + FINISH_SECONDS
        while self._num_writes and time.monotonic() < deadline:
            time.sleep(0.05)
        logger.info(f"ends: {self._ending}; {self._num_writes} writes were cut off")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            os.write(self._wake_write, b"!")

    def _accept(self) -> None:
        try:
            connection, where = self._listener.accept()
        except OSError:  # gone again, or out of descriptors
            time.sleep(0.01)
            return
        with self._lock:
            self._num_connections += 1
            self._num_strangers += 1
        try:
            threading.Thread(target=self._serve, args=(connection, where[0]), daemon=True).start()
        except RuntimeError as error:  # the machine's limit of threads; others may end
            logger.warning(f"{where[0]} is sent away: {error}")
            connection.close()
            with self._lock:
                self._num_connections -= 1
                self._num_strangers -= 1
            time.sleep(0.01)

    def _serve(self, connection: socket.socket, where: str) -> None:
        try:
            try:
                wire = admit(connection, self._token, timeout_seconds=self._settings.timeout_seconds)
            finally:
                with self._lock:
                    self._num_strangers -= 1
                self._wake()
            while wire.has_more(within_seconds=_KEEP_SECONDS):
                self._next_request(wire)
        except WireClosed:
            pass  # as clients do when they are done
        except WireError as error:
            logger.warning(f"{where} {error}")
        except Exception:  # an agent outlives any request
            logger.exception(f"a request of {where} failed")
        finally:
            connection.close()
            with self._lock:
                self._num_connections -= 1
            self._wake()

    def _next_request(self, wire: Wire) -> None:
        request = wire.receive()
        try:
            answer = self._handlers[str(request["request"])](wire, request)
        except HypershardError as error:
            answer = {"error": str(error)}
        except (OSError, KeyError, TypeError, ValueError) as error:
            answer = {"error": f"{request.get('request')}: {type(error).__name__}: {error}"}
        if answer is not None:
            if "error" in answer:
                logger.warning(answer["error"])
            wire.send(answer)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            self._num_writes += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_writes -= 1

    def _root(self, request: Mapping[str, Any]) -> Path:
        name = str(request["root"])
        if name not in self._settings.roots:
            raise StorageError(f"no {name!r} checkpoints are kept here, only {', '.join(self._settings.roots)}")
        return self._settings.roots[name]

    def _ping(self, _wire: Wire, _request: Mapping[str, Any]) -> dict[str, Any]:
        roots = {name: str(self._settings.roots[name]) for name in self._settings.roots}
        return {
            "version": hypershard.__version__,
            "pid": os.getpid(),
            "host": self._settings.host,
            "roots": {"memory": None, "disk": None} | roots,
        }

    def _watch(self, _wire: Wire, request: Mapping[str, Any]) -> dict[str, Any]:
        pid = int(request["pid"])
        watched = os.pidfd_open(pid)
        with self._lock:
            if self._ending:
                os.close(watched)
                raise StorageError(f"this agent is about to go: {self._ending}")
            self._watched = watched  # the old one stays open: its number, used again, would pass for it in `run`
        self._wake()
        logger.info(f"watches process {pid}")
        return {}

    def _reserve(self, wire: Wire, request: Mapping[str, Any]) -> dict[str, Any]:
        copies = {int(rank): int(size) for rank, size in request["copies"].items()}
        with wire.still_working(), contextlib.ExitStack() as locks:
            for rank in sorted(copies):
                locks.enter_context(self._of_rank[rank])
            reserve(self._memory, copies)
        logger.info(f"{sum(copies.values()) * 2} bytes are reserved for copies of ranks {sorted(copies)}")
        return {}

    def _put(self, wire: Wire, request: Mapping[str, Any]) -> dict[str, Any]:
        offer = Offer.from_json(request)
        lock = self._of_rank[offer.rank]
        with wire.still_working():
            lock.acquire()
        try:
            with self._writing():
                slot = choose_slot(self._memory, offer)
                if slot is None:
                    return {"held": True}
                wire.send({"held": False})
                with wire.still_working():  # much may be under way when the sender has handed all to its kernel
                    receive(wire, slot, offer)
        except WireError as error:
            logger.warning(f"the copy of rank {offer.rank}, step {offer.step}, was cut off: its sender {error}")
            raise
        finally:
            lock.release()
        return {}

    def _replicate(self, wire: Wire, request: Mapping[str, Any]) -> dict[str, Any]:
        path = str(request["path"])
        targets = [AgentAddress(str(one["host"]), int(one["port"]), str(one["token"])) for one in request["targets"]]
        with wire.still_working(), self._writing(), ThreadPoolExecutor(max(len(targets), 1)) as pool:
            outcomes = list(pool.map(lambda target: self._send_copy(path, target), targets))
        for text in filter(None, outcomes):
            logger.warning(f"no copy of {path}: {text}")
        return {"outcomes": outcomes}

    def _send_copy(self, path: str, target: AgentAddress) -> str | None:
        with self._lock:
            client = self._clients.get(target)
            if client is None:
                client = AgentClient(target, timeout_seconds=self._settings.timeout_seconds)
                self._clients[target] = client
        try:
            with open_blob(self._memory, path) as file:
                blob = OpenBlob(path, file)
                table, size_bytes = read_table(blob), blob_bytes(blob.read(0, HEAD_BYTES))
                if table is None or size_bytes is None:
                    return f"{path} holds no finished blob"
                client.put(file, Offer(table.rank, table.lineage, table.step, size_bytes, table.size_bytes))
        except HypershardError as error:
            return str(error)
        return None

    def _list(self, _wire: Wire, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"held": held_blobs(self._root(request))}

    def _read(self, wire: Wire, request: Mapping[str, Any]) -> None:
        offset, size_bytes = int(request["offset"]), int(request["size_bytes"])
        if offset < 0 or size_bytes < 0:
            raise ValueError(f"{size_bytes} bytes from byte {offset} on")
        with open_blob(self._root(request), str(request["path"])) as file:
            found = max(0, min(size_bytes, os.fstat(file.fileno()).st_size - offset))
            wire.send({"size_bytes": found})
            wire.send_file(file, offset=offset, size_bytes=found)

    def _stop(self, wire: Wire, _request: Mapping[str, Any]) -> None:
        wire.send({})  # later nobody may be there to send it
        self._ending = "it was asked to"
        self._wake()


def main() -> int:
    """Read the settings, detach from whoever started it, and serve. What goes wrong before "ready" is said instead."""
    line = sys.stdin.buffer.readline()
    if os.fork():
        return 0  # the agent is nobody's child, so nobody has to wait for it at its end
    os.setsid()
    os.umask(0o077)
    for one in _IGNORED:
        signal.signal(one, signal.SIG_IGN)
    try:
        settings = Settings.from_json(line)
        memory = settings.roots["memory"]
        os.chdir(memory)
        _log_to(memory / LOG_FILE)
        _allow_many_files()
        _lock(memory / LOCK_FILE)
        agent = Agent(settings)
        agent.announce()
    except (HypershardError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}" if not isinstance(error, HypershardError) else error, flush=True)
        return 1
    print("ready", flush=True)
    _let_go(memory / LOG_FILE)
    agent.run()
    logging.shutdown()
    os._exit(0)  # threads that still wait for a peer are not waited for


def _log_to(path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))


def _lock(path: Path) -> None:
    """Hold the lock that one agent per memory root may hold; the kernel frees it when that one dies, however."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(f"another agent serves {path.parent} and does not end") from None
            time.sleep(0.05)


def _let_go(log: Path) -> None:
    """Keep nothing open of the process that started the agent: it may wait for the other end to close."""
    nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_APPEND)
    for old, new in ((nothing, 0), (nothing, 1), (errors, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(errors)


if __name__ == "__main__":
    sys.exit(main())
