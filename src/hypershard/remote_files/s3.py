"""Objects of S3 buckets, through s3fs: ranges of their bytes, and which there are."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DataError, StorageError
from .patience import Passing, Patience, insist

T = TypeVar("T")

_CREDENTIALS = (
    "check that the credentials boto3's standard chain finds (AWS_* variables, config files, instance role) may do "
    "s3:GetObject and s3:ListBucket there"
)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as a listing shows it; `version` changes when the content does."""

    location: str
    size_bytes: int
    version: str


def list_files(prefix: str, *, patience: Patience | None = None) -> list[RemoteFile]:
    """All objects below `prefix` (s3://bucket/folder), or the one that has this very name; sorted by name.

    DataError: no such bucket, or no right to list it. StorageError: it does not answer.
    """
    patience = patience or Patience()
    doing = f"listing {prefix}"
    found = _ask(doing, lambda files: files.find(prefix, detail=True), patience)
    return [
        RemoteFile(location=f"s3://{name}", size_bytes=int(entry["size"]), version=_version(entry))
        for name, entry in sorted(found.items())
        if entry["type"] == "file"
    ]


def size_of(location: str, patience: Patience) -> int:
    return int(_ask(f"reading {location}", lambda files: files.info(location), patience)["size"])


def fetch_range(location: str, start: int, end: int, *, patience: Patience) -> bytes:
    """Bytes `start` to `end` of an object, exactly. DataError: no such object, no right, or it ends before."""
    doing = f"reading {location} at byte {start}"

    def read(files: Any) -> bytes:
        content: bytes = files.cat_file(location, start=start, end=end)
        if len(content) != end - start:
            raise Passing(f"the answer broke off after {len(content)} of {end - start} bytes")
        return content

    return _ask(doing, read, patience)


def _version(entry: dict[str, Any]) -> str:
    return str(entry.get("ETag") or entry.get("LastModified")).strip('"')


def _ask(doing: str, request: Callable[[Any], T], patience: Patience) -> T:
    files = _file_system(patience)

    def attempt() -> T:
        try:
            return request(files)
        except (Passing, StorageError):
            raise
        except Exception as error:  # of botocore, aiohttp and s3fs, which share no base
            raise _failure(doing, error) from error

    return insist(doing, attempt, patience)


def _file_system(patience: Patience) -> Any:
    """s3fs's object for this process and thread; it keeps them itself, so asking again costs nothing."""
    try:
        import s3fs
    except ImportError as error:
        raise DataError("--dataset=s3://…: S3 data sets need the package s3fs; pip install s3fs") from error
    files = s3fs.S3FileSystem(
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.read_seconds,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )
    files.retries = 1  # `insist` tries again
    return files


def _failure(doing: str, error: Exception) -> Exception:
    """What to raise for what S3, or the way to it, answered: Passing, or a DataError that says what to check."""
    from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError

    cause = (str(error) or type(error).__name__).strip().rstrip(".")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{doing}: no such object or bucket ({cause}); check the name, the region and the endpoint")
    if isinstance(error, PermissionError):
        return DataError(f"{doing}: refused ({cause}); {_CREDENTIALS}")
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return DataError(f"{doing}: refused ({cause})")
    if "CERTIFICATE" in cause.upper():
        return DataError(f"{doing}: {cause}; check AWS_ENDPOINT_URL and AWS_CA_BUNDLE")
    if isinstance(error, BotoCoreError) and not isinstance(error, ConnectionError | HTTPClientError):
        return DataError(f"{doing}: {cause}; {_CREDENTIALS}")
    return Passing(cause)
