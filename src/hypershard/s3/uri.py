"""What an object is called, and how long something may take."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from ..errors import StorageError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class S3Uri:
    """`s3://bucket/key/parts`, without a slash at the end; an empty key is the whole bucket."""

    bucket: str
    key: str

    def __post_init__(self) -> None:
        if not _BUCKET.fullmatch(self.bucket) or ".." in self.bucket:
            self._refuse(f"{self.bucket!r} is no bucket name (3 to 63 small letters, digits, dots, hyphens)")
        if len(self.key.encode()) > 1024 or not self.key.isprintable():
            self._refuse("a key has at most 1024 bytes, all printable")
        if self.key and any(part in ("", ".", "..") for part in self.key.split("/")):
            self._refuse("a key has no empty, '.' or '..' part and does not end with a slash")

    def _refuse(self, reason: str) -> None:
        raise StorageError(f"{self}: {reason}; expected s3://bucket/prefix")

    @classmethod
    def parse(cls, text: str) -> S3Uri:
        """The URI in `text`; one slash at its end is dropped. Raises StorageError."""
        if not text.startswith("s3://"):
            raise StorageError(f"{text} is no S3 URI; expected s3://bucket/prefix")
        bucket, _, key = text.removeprefix("s3://").partition("/")
        return cls(bucket, key.removesuffix("/"))

    def __truediv__(self, name: str) -> S3Uri:
        return S3Uri(self.bucket, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"

    @property
    def prefix(self) -> str:
        """What the keys below this one begin with."""
        return f"{self.key}/" if self.key else ""


@dataclass(frozen=True)
class Deadline:
    """When something must be done, on this process's monotonic clock."""

    ends_at: float
    limit_seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds, seconds)

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self.ends_at - time.monotonic())

    def check(self, doing: str) -> None:
        """Raises StorageError when the time is up."""
        if not self.remaining_seconds:
            raise StorageError(f"{doing}: not done within {self.limit_seconds:g} s", shared_by_all_ranks=False)
