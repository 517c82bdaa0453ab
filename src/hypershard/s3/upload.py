"""A large object, part by part."""

from __future__ import annotations

import io
import threading
import uuid
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from ..errors import StorageError
from ..log import logger
from .bodies import Body, crc32c
from .refusals import Refusal
from .requests import Requests
from .uri import Deadline, S3Uri

# Amazon S3 quotas, https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html (read 2026)
_LARGEST_PART_BYTES = 5 * 2**30
# 10,000 parts are allowed: parts that double so often reach the largest object (5 TiB) from 5.2 MiB on.
_PARTS_PER_SIZE = 1000
_PARTS_AT_ONCE = 4
_MARK = "hypershard-upload"  # metadata that tells an object of this upload from another one of the same name

Buffer = bytes | bytearray | memoryview


class Upload(io.RawIOBase):
    """A stream to one object: buffers parts and sends four at a time; `close` makes the object appear.

    As a context manager it aborts when the block raises, so that nothing is left. Less than one part goes by a single
    request. Parts double every 1000, which takes a file to S3's 5 TiB. Each part's CRC32C travels with it and S3
    refuses the part if it does not match. Memory: five parts. Not for several threads at once.
    """

    def __init__(self, requests: Requests, uri: S3Uri, *, deadline: Deadline, part_bytes: int) -> None:
        self._requests, self._uri, self._deadline, self._part_bytes = requests, uri, deadline, part_bytes
        self._upload_id: str | None = None
        self._mark = uuid.uuid4().hex
        self._stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[dict[str, Any]]] = set()
        self._sent: list[dict[str, Any]] = []
        self._num_parts = 0
        self._size_bytes = 0
        self._idle: list[memoryview] = []
        self._buffer = memoryview(b"")
        self._filled = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes

    def write(self, data: Any) -> int:
        """Take all of a contiguous buffer, which may be changed afterwards. Waits while four parts are on their way."""
        if self.closed:
            raise ValueError(f"{self._uri} is closed")
        view = memoryview(data)
        num_bytes = view.nbytes
        if not num_bytes:
            return 0
        view = view.cast("B")
        try:
            while view.nbytes:
                # A full buffer waits for more to come: the last part is never empty, and one part alone is no upload.
                if self._filled == self._buffer.nbytes:
                    self._next_buffer()
                piece = view[: self._buffer.nbytes - self._filled]
                self._buffer[self._filled : self._filled + piece.nbytes] = piece
                self._filled += piece.nbytes
                view = view[piece.nbytes :]
        except BaseException:  # also a signal: open uploads cost money
            self.abort()
            raise
        self._size_bytes += num_bytes
        return num_bytes

    def close(self) -> None:
        """Send what is left and make the object appear. Raises StorageError, and then nothing is left in the bucket."""
        if self.closed:
            return
        try:
            if self._pool is None:
                put_object(self._requests, self._uri, self._buffer[: self._filled], self._deadline)
            else:
                self._send_part()
                while self._running:
                    self._collect_one()
                self._complete()
                self._pool.shutdown()
        except BaseException:  # also a signal: what stays in the bucket costs money
            self.abort()
            raise
        super().close()

    def abort(self) -> None:
        """End the upload so that nothing of it is left; an upload that is closed already stays as it is."""
        if self.closed:
            return
        self._stopped.set()
        if self._pool is not None:
            # A part that arrives after the abort would stay in the bucket, so those on their way end first.
            self._pool.shutdown(cancel_futures=True)
        if self._upload_id is not None:
            limits = self._requests.limits
            grace = Deadline.after(limits.connect_seconds + limits.read_seconds)
            try:
                abort_upload(self._requests, self._uri.bucket, self._uri.key, self._upload_id, grace)
            except (StorageError, OSError) as error:
                logger.warning("an unfinished upload of %s stays in the bucket: %s", self._uri, error)
        super().close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        # RawIOBase closes what is forgotten, but closing commits. What was forgotten was not finished.
        self._stopped.set()
        super().close()

    def part_size_bytes(self, number: int) -> int:
        """Size of part `number`, counted from 1 (the last one is as long as what is left)."""
        return min(self._part_bytes * 2 ** ((number - 1) // _PARTS_PER_SIZE), _LARGEST_PART_BYTES)

    def _next_buffer(self) -> None:
        """An empty buffer in place of the full one, which is sent."""
        if self._filled:
            self._send_part()
        size_bytes = self.part_size_bytes(self._num_parts + 1)
        while self._idle and self._buffer.nbytes != size_bytes:
            self._buffer = self._idle.pop()
        if self._buffer.nbytes != size_bytes:
            self._buffer = memoryview(bytearray(size_bytes))

    def _send_part(self) -> None:
        if self._pool is None:
            self._start()
        while len(self._running) >= _PARTS_AT_ONCE:
            self._collect_one()
        assert self._pool is not None
        self._num_parts += 1
        self._running.add(self._pool.submit(self._upload_part, self._num_parts, self._buffer, self._filled))
        self._buffer, self._filled = memoryview(b""), 0

    def _start(self) -> None:
        answer = self._requests.insist(
            f"starting to write {self._uri}",
            lambda client: client.create_multipart_upload(
                Bucket=self._uri.bucket,
                Key=self._uri.key,
                ChecksumAlgorithm="CRC32C",
                Metadata={_MARK: self._mark},
            ),
            self._deadline,
        )
        self._upload_id = answer["UploadId"]
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="s3-upload")

    def _upload_part(self, number: int, buffer: memoryview, size_bytes: int) -> dict[str, Any]:
        doing = f"writing part {number} of {self._uri}"

        def check() -> None:
            self._deadline.check(doing)
            if self._stopped.is_set():
                raise StorageError(f"{doing}: stopped", shared_by_all_ranks=False)

        def request(client: Any) -> str:
            check()
            answer = client.upload_part(
                Bucket=self._uri.bucket,
                Key=self._uri.key,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=Body(view, check),
                ChecksumCRC32C=checksum,
            )
            return str(answer["ETag"])

        view = buffer[:size_bytes]
        checksum = crc32c(view)
        etag = self._requests.insist(doing, request, self._deadline, pause=self._stopped.wait)
        self._idle.append(buffer)
        return {"PartNumber": number, "ETag": etag, "ChecksumCRC32C": checksum}

    def _collect_one(self) -> None:
        """Wait for a part to arrive. Raises what it met."""
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        self._sent += [part.result() for part in done]

    def _complete(self) -> None:
        parts = sorted(self._sent, key=lambda part: int(part["PartNumber"]))
        wanted = {"Bucket": self._uri.bucket, "Key": self._uri.key, "UploadId": self._upload_id}
        try:
            self._requests.insist(
                f"finishing {self._uri}",
                lambda client: client.complete_multipart_upload(**wanted, MultipartUpload={"Parts": parts}),
                self._deadline,
            )
        except Refusal as error:
            if error.code != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        """Whether an attempt to finish whose answer was lost had succeeded."""
        wanted = {"Bucket": self._uri.bucket, "Key": self._uri.key}
        try:
            found = self._requests.insist(
                f"looking for {self._uri}", lambda client: client.head_object(**wanted), self._deadline
            )
        except FileNotFoundError:
            return False
        return bool(found["Metadata"].get(_MARK) == self._mark)


def put_object(
    requests: Requests, uri: S3Uri, content: Buffer, deadline: Deadline, *, only_if_absent: bool = False
) -> None:
    """Write a whole object by one request."""
    view = memoryview(content)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    wanted = {"Bucket": uri.bucket, "Key": uri.key, "ChecksumCRC32C": crc32c(view)}
    if only_if_absent:
        wanted["IfNoneMatch"] = "*"
    doing = f"writing {uri}"
    requests.insist(
        doing,
        lambda client: client.put_object(**wanted, Body=Body(view, lambda: deadline.check(doing))),
        deadline,
    )


def abort_upload(requests: Requests, bucket: str, key: str, upload_id: str, deadline: Deadline) -> None:
    """End a multipart upload of whatever key; one that has ended already is fine."""
    wanted = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
    doing = f"aborting the upload of s3://{bucket}/{key}"
    try:
        requests.insist(doing, lambda client: client.abort_multipart_upload(**wanted), deadline)
    except Refusal as error:
        if error.code != "NoSuchUpload":
            raise
