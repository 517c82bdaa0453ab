"""The operations on a bucket that the rest of the program needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import StorageError
from .bodies import received
from .refusals import PASSING_CODES, Broken, final
from .requests import Limits, Requests
from .upload import Buffer, Upload, abort_upload, put_object
from .uri import Deadline, S3Uri

_KEYS_PER_DELETE = 1000  # https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html


@dataclass(frozen=True)
class _Listing:
    """An operation that answers in pages; the next page starts at what `Next` + marker said."""

    what: str
    operation: str
    markers: tuple[str, ...]


_LIST_OBJECTS = _Listing("objects", "list_objects_v2", ("ContinuationToken",))
_LIST_UPLOADS = _Listing("unfinished uploads", "list_multipart_uploads", ("KeyMarker", "UploadIdMarker"))


class S3:
    """One client for all threads of a process. Every method raises StorageError, one sentence, when it gives up.

    A method's `deadline` is for all its attempts; it is overrun by at most the time-outs of one request, and for a
    listing by the time its one answer takes to arrive.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._requests = Requests(limits or Limits())

    def put(self, uri: S3Uri, content: Buffer, *, deadline: Deadline, only_if_absent: bool = False) -> None:
        """Write a whole object (at most 5 GiB) by one request. With `only_if_absent` raises AlreadyExists; an attempt
        whose answer was lost may then meet its own object."""
        put_object(self._requests, uri, content, deadline, only_if_absent=only_if_absent)

    def open_write(self, uri: S3Uri, *, deadline: Deadline, part_bytes: int) -> Upload:
        """A stream to an object that appears, whole, when the stream is closed."""
        return Upload(self._requests, uri, deadline=deadline, part_bytes=part_bytes)

    def read(self, uri: S3Uri, *, deadline: Deadline) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        doing = f"reading {uri}"

        def request(client: Any) -> bytes:
            answer = client.get_object(Bucket=uri.bucket, Key=uri.key)
            return received(answer, answer["ContentLength"], lambda: deadline.check(doing))

        return self._requests.insist(doing, request, deadline)

    def read_range(self, uri: S3Uri, offset: int, size_bytes: int, *, deadline: Deadline) -> bytes:
        """Exactly these bytes. Raises FileNotFoundError, and StorageError when the object ends before them."""
        if not size_bytes:
            return b""
        last = offset + size_bytes - 1
        doing = f"reading bytes {offset} to {last} of {uri}"

        def request(client: Any) -> bytes:
            answer = client.get_object(Bucket=uri.bucket, Key=uri.key, Range=f"bytes={offset}-{last}")
            found = str(answer.get("ContentRange", ""))
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", found)
            if span and (int(span[1]), int(span[2])) == (offset, last):
                return received(answer, size_bytes, lambda: deadline.check(doing))
            answer["Body"].close()
            if span and int(span[3]) <= last:
                raise StorageError(f"{doing}: it has only {span[3]} bytes", shared_by_all_ranks=False)
            raise Broken(f"the answer has the range {found or 'of the whole object'}")

        return self._requests.insist(doing, request, deadline)

    def list_objects(self, prefix: S3Uri, *, deadline: Deadline) -> dict[str, int]:
        """Name relative to `prefix` -> size in bytes of all objects below it. Folder markers (`name/`) are left out."""
        found = {}
        for page in self._pages(_LIST_OBJECTS, prefix, deadline):
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(prefix.prefix)
                if not name.endswith("/") and name:
                    found[name] = int(entry["Size"])
        return found

    def delete(self, uris: Iterable[S3Uri], *, deadline: Deadline) -> None:
        """Delete objects of one bucket or several; one that is not there is fine."""
        keys: dict[str, list[str]] = {}
        for uri in uris:
            keys.setdefault(uri.bucket, []).append(uri.key)
        for bucket, all_keys in keys.items():
            for start in range(0, len(all_keys), _KEYS_PER_DELETE):
                self._delete(bucket, all_keys[start : start + _KEYS_PER_DELETE], deadline)

    def _delete(self, bucket: str, keys: list[str], deadline: Deadline) -> None:
        doing = f"deleting {len(keys)} objects, s3://{bucket}/{keys[0]} first"

        def request(client: Any) -> None:
            wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            answer = client.delete_objects(Bucket=bucket, Delete=wanted, ChecksumAlgorithm="CRC32C")
            # 200 OK says only that the request was understood; each key has its own answer.
            refused = [entry for entry in answer.get("Errors", []) if entry.get("Code") != "NoSuchKey"]
            for entry in sorted(refused, key=lambda entry: entry.get("Code") in PASSING_CODES):
                code, reason = entry.get("Code", "unknown"), entry.get("Message", "")
                if code in PASSING_CODES:
                    raise Broken(f"{code} for s3://{bucket}/{entry.get('Key')}")
                raise final(f"deleting s3://{bucket}/{entry.get('Key')}", code, reason)

        self._requests.insist(doing, request, deadline)

    def abort_uploads(self, prefix: S3Uri, *, deadline: Deadline) -> int:
        """Abort every unfinished multipart upload below `prefix`; returns how many there were.

        What a killed process leaves open is invisible and paid for; S3 itself ends it only where a bucket rule says so.
        """
        num_aborted = 0
        for page in self._pages(_LIST_UPLOADS, prefix, deadline):
            for entry in page.get("Uploads", []):
                abort_upload(self._requests, prefix.bucket, entry["Key"], entry["UploadId"], deadline)
                num_aborted += 1
        return num_aborted

    def _pages(self, listing: _Listing, prefix: S3Uri, deadline: Deadline, **more: str) -> Iterator[dict[str, Any]]:
        wanted = {"Bucket": prefix.bucket, "Prefix": prefix.prefix, **more}
        while True:
            page: dict[str, Any] = self._requests.insist(
                f"listing {listing.what} in {prefix}",
                lambda client: getattr(client, listing.operation)(**wanted),
                deadline,
            )
            yield page
            if not page.get("IsTruncated"):
                return
            wanted.update({marker: page[f"Next{marker}"] for marker in listing.markers})
