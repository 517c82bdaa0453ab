"""The daemon of HyperPod's memory tier as its client meets it, on loopback, failing as told.

The protocol is read off the client (amzn-sagemaker-checkpointing 1.1.3). Where that leaves open what the real one
does, this one does what is hardest to live with: a shard is never overwritten (409), a step counts as latest only when
all ranks have put it, and the lowest steps are dropped as soon as one shard of a higher one arrives.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import xxhash

_NAMESPACE = re.compile(r"/v1/cp/namespaces/([\w-]+)")
_LATEST = re.compile(r"/v1/cp/checkpoints/([\w-]+)/latest")
_SHARD = re.compile(r"/v1/cp/checkpoints/([\w-]+)/(\d+)/(\d+)")
_TRICKLE_SECONDS = 0.05
_SLOW_BYTES_PER_SECOND = 20 * 2**20


@dataclass
class Space:
    """One namespace. A shard is (body, Shard-Meta)."""

    num_ranks: int
    steps_retained: int
    shards: dict[tuple[int, int], tuple[bytes, str]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted({step for _, step in self.shards}, reverse=True)

    def complete_steps(self) -> list[int]:
        return [step for step in self.steps if all((rank, step) in self.shards for rank in range(self.num_ranks))]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" `pattern` is found in.

    kind: "500"; "late 500" (after it was done); "stall" (no answer); "slow" (takes 20 MiB a second); "trickle" (a byte
    now and then); "flip" (one bit of the answer's body); "cut" (half of the body, then the connection closes);
    "no meta" (without Shard-Meta); "garbage" (no JSON); "race" (another client makes the namespace first).
    """

    kind: str
    pattern: str = ""
    times: int = 10**9


@dataclass
class Answer:
    status: int
    body: bytes = b""
    meta: str | None = None


class Daemon:
    """A running daemon; `url` is what a client is given."""

    def __init__(self) -> None:
        self.spaces: dict[str, Space] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.num_resets = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._server = self._listen(0)
        self._port = self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        daemon = self

        class Handler(_Handler):
            owner = daemon

        server = _Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse connections within this block."""
        self._server.shutdown()
        self._server.server_close()
        yield
        self._server = self._listen(self._port)

    @contextlib.contextmanager
    def failing(self, kind: str, pattern: str = "", *, times: int = 10**9) -> Iterator[None]:
        fault = Fault(kind, pattern, times)
        self.faults.append(fault)
        yield
        self.faults.remove(fault)

    def forget_everything(self) -> None:
        with self.lock:
            self.spaces.clear()

    def fault_of(self, request: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.kind
        return None

    def answer(self, method: str, url: str, body: bytes, meta: str | None) -> Answer:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        with self.lock:
            if found := _NAMESPACE.fullmatch(parts.path):
                return self._namespace(method, found[1], query)
            if method == "GET" and (found := _LATEST.fullmatch(parts.path)):
                space = self.spaces.get(found[1])
                if space is None:
                    return Answer(404, b"no such namespace")
                return Answer(200, json.dumps(space.complete_steps()[: int(query["limit"])]).encode())
            if found := _SHARD.fullmatch(parts.path):
                return self._shard(method, found[1], (int(found[2]), int(found[3])), body, meta)
            if (method, parts.path) == ("POST", "/v1/cp/cluster/reset"):
                self.spaces.clear()
                self.num_resets += 1
                return Answer(200)
        return Answer(404, b"no such path")

    def _namespace(self, method: str, name: str, query: dict[str, str]) -> Answer:
        if method == "POST":
            if name in self.spaces:
                return Answer(409, b"namespace exists")
            self.spaces[name] = Space(int(query["num_ranks"]), int(query["steps_retained"]))
            return Answer(201)
        if name not in self.spaces:
            return Answer(404, b"no such namespace")
        if method == "DELETE":
            del self.spaces[name]
            return Answer(204)
        space = self.spaces[name]
        return Answer(200, json.dumps({"num_ranks": space.num_ranks, "steps_retained": space.steps_retained}).encode())

    def _shard(self, method: str, name: str, key: tuple[int, int], body: bytes, meta: str | None) -> Answer:
        space = self.spaces.get(name)
        if space is None:
            return Answer(404, b"no such namespace")
        if key[0] >= space.num_ranks:
            return Answer(400, b"no such rank")
        if method == "POST":
            return _keep(space, key, body, meta)
        if key not in space.shards:
            return Answer(404, b"no such shard")
        if method == "DELETE":
            del space.shards[key]
            return Answer(204)
        return Answer(200, *space.shards[key])


def _keep(space: Space, key: tuple[int, int], body: bytes, meta: str | None) -> Answer:
    if key in space.shards:
        return Answer(409, b"shard exists")
    if meta is None or checksum(body) != json.loads(meta)["checksum"]:
        return Answer(400, b"checksum mismatch")
    space.shards[key] = (body, meta)
    for step in space.steps[space.steps_retained :]:
        for rank in range(space.num_ranks):
            space.shards.pop((rank, step), None)
    return Answer(201)


def checksum(body: bytes) -> str:
    return base64.b64encode(xxhash.xxh3_128(body).digest()).decode()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that gave up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart
    owner: Daemon

    def log_message(self, *_: object) -> None:
        """Tests read what the program under test prints."""

    def _handle(self) -> None:
        request = f"{self.command} {self.path}"
        self.owner.requests.append(request)
        fault = self.owner.fault_of(request)
        if fault == "stall":  # the body stays where it is, as with a daemon that hangs
            self.owner.released.wait()
            self.close_connection = True
            return
        body = self._body(is_slow=fault == "slow")
        if fault == "race":
            self.owner.answer(self.command, self.path, body, None)
        answer = Answer(500, b"out of order")
        if fault != "500":
            done = self.owner.answer(self.command, self.path, body, self.headers.get("Shard-Meta"))
            answer = answer if fault == "late 500" else done
        self._send(answer, fault)

    def _body(self, *, is_slow: bool) -> bytes:
        missing = int(self.headers.get("Content-Length", 0))
        pieces = []
        while missing:
            piece = self.rfile.read(min(missing, 2**20))
            if not piece:
                raise ConnectionError("the client hung up")
            pieces.append(piece)
            missing -= len(piece)
            if is_slow:
                time.sleep(len(piece) / _SLOW_BYTES_PER_SECOND)
        return b"".join(pieces)

    def _send(self, answer: Answer, fault: str | None) -> None:
        body = answer.body
        if fault == "garbage":
            body = b"<html>"
        elif fault == "flip" and body:
            spoiled = bytearray(body)
            spoiled[len(spoiled) // 2] ^= 1
            body = bytes(spoiled)
        self.send_response(answer.status)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(body)))
        if answer.meta is not None and fault != "no meta":
            self.send_header("Shard-Meta", answer.meta)
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "trickle":
            for byte in body:
                if self.owner.released.is_set():
                    break
                with contextlib.suppress(OSError):
                    self.wfile.write(bytes([byte]))
                time.sleep(_TRICKLE_SECONDS)
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _handle


@contextlib.contextmanager
def hyperpod_daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    try:
        yield daemon
    finally:
        daemon.stop()
