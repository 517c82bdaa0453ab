"""A hub on loopback: lists data sets and models, answers ranges of their files, and is as busy as it is told to be.

It speaks what https://huggingface.co/docs/hub/api and huggingface_hub's own requests say of listings, files and errors.
Large files (as the hub keeps them in LFS) are redirected to a signed address on another host, as there.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

TOKEN = "hf_test_token"
_PAGE_ENTRIES = 3
_LFS_BYTES = 1000


@dataclass
class Repository:
    """Files of a data set or model at its newest commit."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.files.items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class Busy:
    """The next `times` requests whose path holds `words` are answered with `status`."""

    words: str
    times: int
    status: int = 429
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    path: str
    host: str
    headers: dict[str, str]  # names in small letters


class HubServer:
    """`datasets` and `models` may be changed at any time; `seen` holds every request, in order."""

    def __init__(self) -> None:
        self.datasets: dict[str, Repository] = {}
        self.models: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # old name -> name, as c4 became allenai/c4
        self.busy: list[Busy] = []
        self.signature = "first"  # signed addresses with another one have run out
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def requests(self, words: str = "") -> list[Seen]:
        with self.lock:
            return [one for one in self.seen if words in one.path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        headers = {name.lower(): value for name, value in self.headers.items()}
        with hub.lock:
            hub.seen.append(Seen(self.path, headers.get("host", ""), headers))
            busy = next((one for one in hub.busy if one.times > 0 and one.words in self.path), None)
            if busy:
                busy.times -= 1
        if busy:
            self._send(busy.status, b"busy", busy.headers)
            return
        split = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query))
        path = urllib.parse.unquote(split.path)
        if found := re.fullmatch(r"/api/(datasets|models)/(.+?)/(revision|tree)/([^/]+)", path):
            self._describe(hub, found, query)
        elif found := re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(hub, "datasets" if found[1] else "models", found[2], found[3], found[4])
        elif path.startswith("/signed/"):
            self._signed(hub, path.removeprefix("/signed/"), query)
        else:
            self._send(404, b"", {})

    do_HEAD = do_GET

    def _repository(self, hub: HubServer, kind: str, name: str, revision: str) -> tuple[str, Repository] | None:
        """None after a refusal."""
        name = hub.renamed.get(name, name)
        repository = (hub.datasets if kind == "datasets" else hub.models).get(name)
        has_token = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None:
            self._send(404 if has_token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not has_token:
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted"})
        elif revision not in ("main", repository.commit):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return name, repository
        return None

    def _describe(self, hub: HubServer, asked: re.Match[str], query: dict[str, str]) -> None:
        kind, name, what, revision = asked.groups()
        found = self._repository(hub, kind, name, revision)
        if found is None:
            return
        name, repository = found
        paths = sorted(repository.files)
        if what == "revision":
            info = {"id": name, "sha": repository.commit, "gated": repository.gated}
            self._send_json(info | {"siblings": [{"rfilename": path} for path in paths]}, {})
            return
        start = int(query.get("cursor", 0))
        entries = [_entry(path, repository.files[path]) for path in paths[start : start + _PAGE_ENTRIES]]
        headers = {}
        if start + _PAGE_ENTRIES < len(paths):
            more = urllib.parse.urlencode(query | {"cursor": start + _PAGE_ENTRIES})
            headers["Link"] = f'<{hub.endpoint}{urllib.parse.urlsplit(self.path).path}?{more}>; rel="next"'
        self._send_json([{"type": "directory", "oid": "0", "size": 0, "path": "folder"}, *entries], headers)

    def _file(self, hub: HubServer, kind: str, name: str, revision: str, path: str) -> None:
        found = self._repository(hub, kind, name, revision)
        if found is None:
            return
        content = found[1].files.get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif len(content) >= _LFS_BYTES:
            # The same server under another name is another host to an HTTP client.
            address = f"http://localhost:{hub.port}/signed/{kind}/{found[0]}/{path}?signature={hub.signature}"
            self._send(302, b"", {"Location": address})
        else:
            self._send_range(content)

    def _signed(self, hub: HubServer, path: str, query: dict[str, str]) -> None:
        if query.get("signature") != hub.signature or "authorization" in self.headers:
            self._send(403, b"", {})
            return
        kind, _, path = path.partition("/")
        repositories = hub.datasets if kind == "datasets" else hub.models
        name = next(name for name in repositories if path.startswith(f"{name}/"))
        self._send_range(repositories[name].files[path.removeprefix(f"{name}/")])

    def _send_range(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if asked is None:
            self._send(200, content, {})
            return
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        self._send(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def _send_json(self, value: object, headers: dict[str, str]) -> None:
        self._send(200, json.dumps(value).encode(), headers | {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "oid": blob, "size": len(content), "path": path}
    if len(content) >= _LFS_BYTES:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 135}
    return entry
