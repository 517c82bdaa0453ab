"""A real S3 API on loopback (moto, in a process of its own) and a proxy in front of it that breaks what it is told to.

The proxy also does what S3 does and moto does not: it compares an upload's checksums with what arrived.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import selectors
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from awscrt import checksums

ACCESS_KEY = "AKIATESTACCESSKEY"
SECRET_KEY = "secret/Test+Key"
_START_SECONDS = 60
_MAX_ANSWER_SECONDS = 120
# Nobody writes to its standard input; that it ends says that whoever started the server is gone, killed or not.
_MOTO = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from moto.server import main
main(sys.argv[1:])
"""


def environment(endpoint: str) -> dict[str, str]:
    """What boto3 reads to talk to a server of this module and to nothing else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


@dataclass(frozen=True)
class Server:
    """A running moto. `endpoint` is its http:// URL."""

    endpoint: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()  # waits, and closes the pipe

    def create_bucket(self, name: str) -> None:
        _ask(self.endpoint, "PUT", f"/{name}")

    def reset(self) -> None:
        """Forget all buckets."""
        _ask(self.endpoint, "POST", "/moto-api/reset")


def _ask(endpoint: str, method: str, path: str) -> None:
    request = urllib.request.Request(endpoint + path, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        answer.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_moto() -> Server:
    """Start moto in a process of its own, so that it shares neither our GIL nor our end."""
    for _ in range(3):  # somebody may take the port between the probe and the start
        port = _free_port()
        # Small parts keep tests quick; S3's smallest is 5 MiB.
        more = {"S3_UPLOAD_PART_MIN_SIZE": "1024", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(2**28)}
        process = subprocess.Popen(
            [sys.executable, "-c", _MOTO, "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | more,
        )
        server = Server(f"http://127.0.0.1:{port}", process)
        give_up_at = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < give_up_at:
            with contextlib.suppress(OSError):
                _ask(server.endpoint, "GET", "/moto-api/data.json")
                return server
            time.sleep(0.1)
        server.stop()
    raise RuntimeError("moto did not start")


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    server = start_moto()
    try:
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. Several may be set at once; `status` and `stall` never reach the upstream."""

    status: int = 0  # answer this status with S3's XML error
    code: str = ""  # S3's word in it; default by status
    reset: str = (
        ""  # "before": reset without an answer; "after": done upstream, but the answer is lost; "middle": of it
    )
    stall: bool = False  # never answer, until `FaultProxy.release`
    bytes_per_second: float = 0  # of the answer's body
    read_bytes_per_second: float = 0  # of the request's body
    flip_download: bool = False  # one bit of the answer's body
    flip_upload: bool = False  # one bit of the request's body
    truncate: bool = False  # half of the answer's body, then the connection closes
    error_in_200: bool = False  # 200 OK whose body is an error; nothing is done upstream


_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in small letters
    num_bytes: int


# Chooses from method, path, query and how many requests of this method, path and query (but for uploadId) came before.
Chooser = Callable[[str, str, dict[str, str], int], Fault | None]


@dataclass(frozen=True)
class Rule:
    """`fault` for the first `times` requests of each kind (None: all) with this method and these words in the URL."""

    fault: Fault
    method: str = ""
    words: str = ""
    times: int | None = None


def by_rules(*rules: Rule) -> Chooser:
    def choose(method: str, path: str, query: dict[str, str], count: int) -> Fault | None:
        url = f"{path}?{urllib.parse.urlencode(query)}"
        for rule in rules:
            wanted = (not rule.method or rule.method == method) and rule.words in url
            if wanted and (rule.times is None or count < rule.times):
                return rule.fault
        return None

    return choose


class FaultProxy:
    """HTTP between a client and `upstream`. Set `choose` at any time; `seen` holds every request, in order."""

    def __init__(self, upstream: str):
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.choose: Chooser | None = None
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.counts: dict[tuple[str, str, str], int] = {}
        self.most_at_once = 0
        self.at_once = 0
        self.num_releases = 0
        self._closing = threading.Event()
        self._server = _Listener(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def set(self, *rules: Rule) -> None:
        """From now on these rules, their counts from zero, and an empty `seen`."""
        with self.lock:
            self.choose = by_rules(*rules)
            self.counts.clear()
            self.seen.clear()
            self.most_at_once = 0

    def release(self) -> None:
        """Let go on what stalls now: its connections are closed without an answer."""
        self.num_releases += 1

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def is_closing(self) -> bool:
        return self._closing.is_set()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def requests(self, method: str = "", words: str = "") -> list[Seen]:
        """Those that came with this method and these words in the URL."""
        with self.lock:
            seen: Sequence[Seen] = list(self.seen)
        return [
            one
            for one in seen
            if (not method or one.method == method) and words in f"{one.path}?{urllib.parse.urlencode(one.query)}"
        ]


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is the business of these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener
    wbufsize = 0
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        # S3 may refuse before the body; whether it does is decided below, so the "go on" is sent there.
        return True

    def handle_any(self) -> None:
        proxy = self.server.proxy
        split = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))
        # A new upload has a new id and new headers: the kind of a request is its method, path and part number.
        kind = (self.command, split.path, str(sorted((k, v) for k, v in query.items() if k != "uploadId")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with proxy.lock:
            count = proxy.counts.get(kind, 0)
            proxy.counts[kind] = count + 1
            choose = proxy.choose
            proxy.at_once += 1
            proxy.most_at_once = max(proxy.most_at_once, proxy.at_once)
        try:
            fault = (choose(self.command, split.path, query, count) if choose else None) or Fault()
            seen = Seen(self.command, split.path, query, headers, int(headers.get("content-length", 0)))
            with proxy.lock:
                proxy.seen.append(seen)
            self._answer(fault, headers)
        finally:
            with proxy.lock:
                proxy.at_once -= 1

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _answer(self, fault: Fault, headers: dict[str, str]) -> None:
        if fault.stall:
            self._stall()
            return
        if headers.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.reset == "before":
            self._reset()
            return
        body = self._body(headers, fault)
        if fault.status:
            self._refuse(fault.status, fault.code or _CODES.get(fault.status, "InternalError"))
            return
        if fault.error_in_200:
            self._refuse(200, fault.code or "InternalError")
            return
        if fault.flip_upload:
            body = _flipped(body)
        if refusal := _wrong_checksum(headers, body):
            self._refuse(400, *refusal)
            return
        status, answer_headers, answer = self._forward(headers, body)
        if fault.reset == "after":
            self._reset()
            return
        if fault.flip_download:
            answer = _flipped(answer)
        self._send(status, answer_headers, answer, fault)

    def _body(self, headers: dict[str, str], fault: Fault) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b"\n", b""):
                pass
            return b"".join(pieces)
        left = int(headers.get("content-length", 0))
        if not fault.read_bytes_per_second:
            return self.rfile.read(left)
        pieces = []
        while left and not self.server.proxy.is_closing:
            piece = self.rfile.read(min(left, max(1, int(fault.read_bytes_per_second / 20))))
            if not piece:
                raise ConnectionError("the client went away")
            pieces.append(piece)
            left -= len(piece)
            time.sleep(len(piece) / fault.read_bytes_per_second)
        return b"".join(pieces)

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        hop = {"expect", "connection", "transfer-encoding", "content-length", "accept-encoding"}
        wanted = {name: value for name, value in headers.items() if name not in hop}
        if "aws-chunked" in headers.get("content-encoding", ""):
            body, trailers = _without_chunks(body)
            for name in ("content-encoding", "x-amz-trailer", "x-amz-decoded-content-length", "x-amz-content-sha256"):
                wanted.pop(name, None)
            wanted |= trailers
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=_MAX_ANSWER_SECONDS)
        try:
            connection.request(self.command, self.path, body=body, headers=wanted)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault) -> None:
        hop = {"connection", "transfer-encoding", "server", "date", "keep-alive"}
        if (fault.truncate or fault.reset == "middle") and not body:  # there is no middle: nothing of it comes
            self._reset() if fault.reset else self._close()
            return
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in hop | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if fault.truncate or fault.reset == "middle":
            self.wfile.write(body[: len(body) // 2])
            if fault.truncate:
                self._close()
            else:
                self._reset()
            return
        if not fault.bytes_per_second:
            self.wfile.write(body)
            return
        step = max(1, int(fault.bytes_per_second / 20))
        for start in range(0, len(body), step):
            if self.server.proxy.is_closing:
                self._close()
                return
            self.wfile.write(body[start : start + step])
            time.sleep(step / fault.bytes_per_second)

    def _refuse(self, status: int, code: str, message: str = "as the test asked") -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        self._send(status, [("Content-Type", "application/xml")], body.encode(), Fault())

    def _stall(self) -> None:
        """Keep the connection open and say nothing, until released or the client gives up."""
        self.close_connection = True
        proxy = self.server.proxy
        num_releases = proxy.num_releases
        with selectors.DefaultSelector() as watch:
            watch.register(self.connection, selectors.EVENT_READ)
            while proxy.num_releases == num_releases and not proxy.is_closing:
                if watch.select(0.05) and not self.connection.recv(2**16):
                    return

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.rfile.close()
        self.connection.close()


def _flipped(body: bytes) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


def _without_chunks(body: bytes) -> tuple[bytes, dict[str, str]]:
    """An aws-chunked body's content and trailers."""
    pieces, at = [], 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        at = end + 2
        if not size:
            break
        pieces.append(body[at : at + size])
        at += size + 2
    lines = [line.decode().partition(":") for line in body[at:].split(b"\r\n") if line]
    return b"".join(pieces), {name.strip().lower(): value.strip() for name, _, value in lines}


def _wrong_checksum(headers: dict[str, str], body: bytes) -> tuple[str, str] | None:
    """S3's refusal of an upload that is not what its checksums say, as code and message."""
    content, sums = body, dict(headers)
    if "aws-chunked" in headers.get("content-encoding", ""):
        content, trailers = _without_chunks(body)
        sums |= trailers
    found = {
        "x-amz-checksum-crc32c": lambda: (checksums.crc32c(content) if content else 0).to_bytes(4, "big"),
        "x-amz-checksum-crc32": lambda: zlib.crc32(content).to_bytes(4, "big"),
        "content-md5": lambda: hashlib.md5(content).digest(),
    }
    for name, compute in found.items():
        if name in sums and base64.b64decode(sums[name]) != compute():
            return "BadDigest", f"The {name} you specified did not match what we received."
    signed = headers.get("x-amz-content-sha256", "")
    if len(signed) == 64 and signed != hashlib.sha256(body).hexdigest():
        return "XAmzContentSHA256Mismatch", "The provided x-amz-content-sha256 header does not match what was computed."
    return None
