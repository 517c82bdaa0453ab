"""Requests to a hub of data sets and models, with huggingface_hub's session: its endpoint, token and offline switch.

A request is made here, not by the library's own functions, because those wait without end or not at all when the hub
asks to be left alone, and ask it again for each file opened; thousands of ranks do that at once.
"""

from __future__ import annotations

import contextlib
import re
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import DataError
from .patience import Passing, Patience, insist

_LOCATION = re.compile(r"hf://(?P<kind>datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>[^/]+)/(?P<path>.+)")
_BUSY_STATUSES = {408, 429, 500, 502, 503, 504}


class Offline(DataError):
    """HF_HUB_OFFLINE forbids to ask."""


class NotThere(DataError):
    """The hub has no such name, revision or file, or does not show it to us."""


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else https://huggingface.co."""
    return str(_library().constants.ENDPOINT)


def hub_host() -> str:
    """The hub as messages and caches name it: without what an address may hold of a password."""
    return hub_endpoint().split("://")[-1].rsplit("@", 1)[-1]


def _is_of_hub(url: str) -> bool:
    one, hub = urlsplit(url), urlsplit(hub_endpoint())
    return (one.scheme, one.hostname, one.port) == (hub.scheme, hub.hostname, hub.port)


def hub_request(doing: str, url: str, *, patience: Patience, headers: dict[str, str] | None = None) -> Any:
    """The hub's answer to a GET (an httpx response), redirects followed.

    `doing` begins the message of every error: Offline, NotThere, Unreachable, or DataError for what it refuses.
    """
    library = _library()
    host = urlsplit(url).netloc.rsplit("@", 1)[-1]

    def attempt() -> Any:
        # Signed addresses of other hosts need no token and are not to have it.
        own = library.utils.build_hf_headers(library_name="hypershard") if _is_of_hub(url) else {}
        # To connect, to read, to write, to get a connection of the pool.
        timeout = (patience.connect_seconds, patience.read_seconds, patience.read_seconds, None)
        try:
            answer = library.utils.get_session().get(url, headers=own | (headers or {}), timeout=timeout)
        except Exception as error:  # told by name: the library has changed its HTTP client twice, the names stayed
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if "TransportError" in kinds:
                raise Passing(f"{host} cannot be reached ({type(error).__name__}: {error})") from error
            raise
        if answer.status_code in _BUSY_STATUSES:
            message = f"{host} answered {answer.status_code}"
            raise Passing(message, wait_seconds=_wait_seconds(answer.headers), busy=True)
        if answer.status_code >= 400:
            raise _refusal(doing, answer, has_token="authorization" in own)
        return answer

    if library.constants.is_offline_mode():
        raise Offline(
            f"{doing}: HF_HUB_OFFLINE is set; unset it where there is a network, or fetch it there by `hf download`"
        )
    return insist(doing, attempt, patience)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as error:
        raise DataError("hub names need the package huggingface_hub; pip install huggingface_hub") from error
    return huggingface_hub


def _wait_seconds(headers: Any) -> float:
    """What an answer asks us to wait: Retry-After (seconds or a date), or the hub's `RateLimit: "api";r=0;t=55`."""
    asked = headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(limit[1]) if limit else 0.0


def _refusal(doing: str, answer: Any, *, has_token: bool) -> DataError:
    """One sentence for a 4xx. https://huggingface.co/docs/huggingface_hub/package_reference/utilities#errors"""
    code = answer.headers.get("x-error-code", "")
    status = answer.status_code
    token = "the token in use (HF_TOKEN) has no access" if has_token else "no token is in use"
    if code == "GatedRepo":
        return DataError(
            f"{doing}: it is gated, and {token}; accept its terms on its page on {hub_host()}, and set HF_TOKEN to "
            "a token of that account"
        )
    if code in ("RevisionNotFound", "EntryNotFound"):
        return NotThere(f"{doing}: the hub has the name, but not this revision or file ({code})")
    if status in (401, 404):  # 401 is the answer for any name that is not there, when no token is given
        return NotThere(f"{doing}: {hub_host()} has no such name, or it is private and {token}; check the name")
    if status == 403:
        return DataError(f"{doing}: access is refused (403), and {token}; check its terms and HF_TOKEN")
    return DataError(f"{doing}: the hub answered {status} {answer.headers.get('x-error-message', '')[:200]}".rstrip())


def hub_url(location: str) -> str:
    """The address of an hf://… location that names a commit. DataError: it does not."""
    found = _LOCATION.fullmatch(location)
    if found is None:
        raise DataError(f"{location}: expected hf://datasets/org/name@commit/path")
    return (
        f"{hub_endpoint()}/{found['kind'] or ''}{found['name']}/resolve/{quote(found['commit'], safe='')}/"
        f"{quote(found['path'])}"
    )


def downloaded_file(location: str) -> Path | None:
    """The file in huggingface_hub's own cache (HF_HOME), where `hf download` and other programs put it."""
    found = _LOCATION.fullmatch(location)
    if found is None:
        return None
    kept = _library().try_to_load_from_cache(
        found["name"],
        found["path"],
        revision=found["commit"],
        repo_type="dataset" if found["kind"] else "model",
    )
    return Path(kept) if isinstance(kept, str) else None


class HubFile:
    """Ranges of bytes of one file of a hub.

    The hub answers with a redirect to a signed address, which is good for many requests: asking the hub for each
    range would use up what it allows in a minute.
    """

    def __init__(self, location: str, patience: Patience) -> None:
        self._location, self._patience = location, patience
        self._url = hub_url(location)
        self._signed_url: str | None = None

    def size_bytes(self) -> int:
        answer = self._get(0, 1)
        span = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("content-range", ""))
        return int(span[1]) if span else len(answer.content)

    def fetch(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, exactly."""

        def attempt() -> bytes:
            answer = self._get(start, end)
            content: bytes = answer.content if answer.status_code == 206 else answer.content[start:end]
            if len(content) != end - start:
                raise Passing(f"the answer broke off after {len(content)} of {end - start} bytes")
            return content

        return insist(self._doing(start), attempt, self._patience)

    def _doing(self, start: int) -> str:
        return f"reading {self._location} at byte {start}"

    def _get(self, start: int, end: int) -> Any:
        headers = {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
        if self._signed_url is not None:
            try:
                return hub_request(self._doing(start), self._signed_url, patience=self._patience, headers=headers)
            except DataError:  # it has run out
                self._signed_url = None
        answer = hub_request(self._doing(start), self._url, patience=self._patience, headers=headers)
        if not _is_of_hub(str(answer.url)):
            self._signed_url = str(answer.url)
        return answer
