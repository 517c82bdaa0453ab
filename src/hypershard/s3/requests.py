"""One client of boto3, and the one loop that tries again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import StorageError
from ..log import logger
from .refusals import CREDENTIALS, ENDPOINT, Broken, clean, is_passing, readable
from .uri import Deadline

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How patient one request is. With the defaults a server that never answers costs 8 read time-outs, about 3 min."""

    connect_seconds: float = 5.0  # also for each piece (128 KiB) of an upload to leave
    read_seconds: float = 20.0  # without a byte of the answer
    num_attempts: int = 8
    first_wait_seconds: float = 0.5  # doubles with each attempt; the actual wait is random between 0 and this
    longest_wait_seconds: float = 20.0
    num_connections: int = 32


class Requests:
    """boto3's client, one for all threads of a process and made at the first request, and how often a request is made.

    botocore makes each attempt once. Trying again is one loop, `insist`, because botocore's own does not know our
    deadlines and gives up when an upload arrives damaged or a body breaks off.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._made: Any = None

    def insist(
        self,
        doing: str,
        request: Callable[[Any], T],
        deadline: Deadline,
        pause: Callable[[float], Any] = time.sleep,
    ) -> T:
        """The answer to `request`, made again until it comes, is refused for good, or attempts or time are used up.

        Raises StorageError, AlreadyExists or FileNotFoundError. `pause` waits some seconds between two attempts.
        """
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        client = self._client()
        num_attempts = self.limits.num_attempts
        failure: Exception | None = None
        for attempt in range(1, num_attempts + 1):
            tried = f"gave up at attempt {attempt} of {num_attempts}, limit {deadline.limit_seconds:g} s: "
            deadline.check(doing)
            try:
                return request(client)
            except (ClientError, BotoCoreError, HTTPError, OSError, Broken) as error:
                stop = error.__context__
                if isinstance(stop, StorageError):  # the time was up in the middle of a body
                    raise readable(doing, failure, tried) if failure else stop from failure
                failure = error
                if not is_passing(error):
                    raise readable(doing, error) from error
                # A random wait keeps many ranks that failed together from coming back together.
                step = self.limits.first_wait_seconds * 2 ** (attempt - 1)
                seconds = random.uniform(0, min(step, self.limits.longest_wait_seconds))
                if attempt == num_attempts or seconds >= deadline.remaining_seconds:
                    raise readable(doing, error, tried) from error
                logger.debug("%s: %s; attempt %d of %d", doing, type(error).__name__, attempt, num_attempts)
            pause(seconds)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _make_client(self.limits)
            return self._made


def _make_client(limits: Limits) -> Any:
    try:
        import awscrt.checksums  # noqa: F401  (missing: better now than at the first part)
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        message = f"S3 needs the package {error.name}; found none: pip install 'boto3[crt]'"
        raise StorageError(message, shared_by_all_ranks=False) from error

    config = Config(
        connect_timeout=limits.connect_seconds,
        read_timeout=limits.read_seconds,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=limits.num_connections,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session()
        client = session.client("s3", config=config)
        if client.meta.endpoint_url.startswith("https:"):
            # botocore does not see that a checksum it was given is one, and would add a SHA-256 of every body
            # (0.7 GB/s on one core). TLS and CRC32C guard the body already; without TLS the SHA-256 stays.
            client = session.client("s3", config=config.merge(Config(s3={"payload_signing_enabled": False})))
    except (BotoCoreError, ValueError) as error:
        message = f"S3 cannot be used: {clean(error)}; {CREDENTIALS}; {ENDPOINT}"
        raise StorageError(message, shared_by_all_ranks=False) from error
    return client
