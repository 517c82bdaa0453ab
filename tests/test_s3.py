"""The S3 client against a real server on loopback, and against a proxy that does what networks and servers do."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from awscrt import checksums

from hypershard.errors import StorageError
from hypershard.s3 import S3, AlreadyExists, Deadline, Limits, S3Uri
from tests.s3_server import ACCESS_KEY, SECRET_KEY, Fault, FaultProxy, Rule, Server, environment, moto

BUCKET = "checkpoints"
PART_BYTES = 64 * 2**10
LIMITS = Limits(connect_seconds=2, read_seconds=5, num_attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02)
BASE = S3Uri(BUCKET, "runs/one")
LARGE = os.urandom(5 * PART_BYTES + 1234)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with moto() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def proxied(server: Server) -> Iterator[tuple[FaultProxy, S3]]:
    """One proxy and one client of it for the module: making a client takes half a second."""
    with FaultProxy(server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(proxy.endpoint).items():
            patch.setenv(name, value)
        s3 = S3(limits=LIMITS)
        s3.list_objects(BASE, deadline=soon())  # the environment is read now
        yield proxy, s3


@pytest.fixture(scope="module")
def hasty(proxied: tuple[FaultProxy, S3]) -> S3:
    """A client for servers that will not answer. A busy machine may be slower than it likes."""
    return S3(limits=dataclasses.replace(LIMITS, connect_seconds=0.5, read_seconds=0.4))


@pytest.fixture
def proxy(proxied: tuple[FaultProxy, S3]) -> Iterator[FaultProxy]:
    proxied[0].set()
    yield proxied[0]
    proxied[0].set()
    s3 = proxied[1]
    s3.delete([BASE / name for name in s3.list_objects(BASE, deadline=soon())], deadline=soon())
    s3.abort_uploads(BASE, deadline=soon())


@pytest.fixture
def s3(proxied: tuple[FaultProxy, S3], proxy: FaultProxy) -> S3:
    return proxied[1]


def soon() -> Deadline:
    return Deadline.after(20)


def crc32c_header(content: bytes) -> str:
    return base64.b64encode(checksums.crc32c(content).to_bytes(4, "big")).decode()


def upload(s3: S3, content: bytes = LARGE, name: str = "large", deadline: Deadline | None = None) -> S3Uri:
    with s3.open_write(BASE / name, deadline=deadline or soon(), part_bytes=PART_BYTES) as stream:
        stream.write(content)
    return BASE / name


def bucket_is_clean(s3: S3, proxy: FaultProxy) -> bool:
    """Neither an object nor an unfinished upload."""
    proxy.set()
    return not s3.list_objects(BASE, deadline=soon()) and not s3.abort_uploads(BASE, deadline=soon())


# --- names and deadlines


def test_uris_are_read_joined_and_printed() -> None:
    uri = S3Uri.parse("s3://my-bucket/runs/one/")
    assert (uri.bucket, uri.key) == ("my-bucket", "runs/one")
    assert str(uri / "a/b") == "s3://my-bucket/runs/one/a/b"
    assert str(S3Uri.parse("s3://my-bucket") / "a") == "s3://my-bucket/a"


@pytest.mark.parametrize(
    "text",
    ["/disk/runs", "s3:/b/k", "S3://bucket/k", "s3://", "s3://Bucket/k", "s3://b/k", "s3://a..b/k", "s3://bucket//k",
     "s3://bucket/a/../b", "s3://bucket/k//", "s3://bucket/a\nb", "s3://bucket/" + "k" * 1025],
)  # fmt: skip
def test_what_is_no_uri_is_refused_with_what_one_looks_like(text: str) -> None:
    with pytest.raises(StorageError, match="expected s3://bucket/prefix"):
        S3Uri.parse(text)


def test_a_deadline_that_passed_says_what_was_not_done() -> None:
    Deadline.after(5).check("copying")
    with pytest.raises(StorageError, match=r"copying: not done within 0 s") as caught:
        Deadline.after(0).check("copying")
    assert not caught.value.shared_by_all_ranks


# --- round trips


def test_small_objects_go_and_come_whole(s3: S3) -> None:
    for content in (b"", b"x", os.urandom(100_000)):
        s3.put(BASE / "small", content, deadline=soon())
        assert s3.read(BASE / "small", deadline=soon()) == content
    s3.put(BASE / "small", memoryview(bytearray(b"view")), deadline=soon())
    assert s3.read(BASE / "small", deadline=soon()) == b"view"


@pytest.mark.parametrize("size_bytes", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, len(LARGE)])
def test_streams_arrive_whole_at_every_border_of_a_part(s3: S3, proxy: FaultProxy, size_bytes: int) -> None:
    content = LARGE[:size_bytes]
    with s3.open_write(BASE / "large", deadline=soon(), part_bytes=PART_BYTES) as stream:
        for start in range(0, size_bytes, 50_001):
            assert stream.write(content[start : start + 50_001]) == len(content[start : start + 50_001])
        assert stream.tell() == size_bytes
    assert s3.read(BASE / "large", deadline=soon()) == content
    parts = proxy.requests("PUT", "partNumber")
    assert len(parts) == (-(-size_bytes // PART_BYTES) if size_bytes > PART_BYTES else 0)


def test_a_tensor_is_saved_into_a_stream_and_read_back(s3: S3) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(100_000)
    with s3.open_write(BASE / "tensor", deadline=soon(), part_bytes=PART_BYTES) as stream:
        torch.save(tensor, stream)
    content = s3.read(BASE / "tensor", deadline=soon())
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), tensor)


def test_any_contiguous_buffer_may_be_written_and_changed_afterwards(s3: S3) -> None:
    numpy = pytest.importorskip("numpy")
    numbers = numpy.arange(60_000).reshape(200, 300)
    expected = numbers.tobytes()
    with s3.open_write(BASE / "numbers", deadline=soon(), part_bytes=PART_BYTES) as stream:
        stream.write(numbers)
        numbers[:] = 0
        stream.write(numbers[:0])
    assert s3.read(BASE / "numbers", deadline=soon()) == expected


def test_ranges_are_exact(s3: S3) -> None:
    uri = upload(s3)
    for offset, size_bytes in ((0, 1), (0, len(LARGE)), (70_000, 100_000), (len(LARGE) - 5, 5), (3, 0)):
        assert s3.read_range(uri, offset, size_bytes, deadline=soon()) == LARGE[offset : offset + size_bytes]


def test_a_range_beyond_the_end_is_refused_at_once(s3: S3, proxy: FaultProxy) -> None:
    uri = upload(s3, b"0123456789")
    proxy.set()
    with pytest.raises(StorageError, match=r"bytes 5 to 14 of .*it has only 10 bytes"):
        s3.read_range(uri, 5, 10, deadline=soon())
    with pytest.raises(StorageError, match="InvalidRange"):
        s3.read_range(uri, 50, 10, deadline=soon())
    assert len(proxy.requests("GET", "large")) == 2


def test_what_is_missing_is_a_missing_file(s3: S3) -> None:
    with pytest.raises(FileNotFoundError, match="s3://checkpoints/runs/one/nothing"):
        s3.read(BASE / "nothing", deadline=soon())
    with pytest.raises(FileNotFoundError):
        s3.read_range(BASE / "nothing", 0, 5, deadline=soon())


def test_listings_go_on_over_pages(s3: S3, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"step-{step}/part {number}+é" for step in range(3) for number in range(3)]
    for name in names:
        s3.put(BASE / name, name.encode(), deadline=soon())
    s3.put(S3Uri(BUCKET, "runs/one-more/x"), b"", deadline=soon())
    client = s3._requests._client()
    client.meta.events.register("provide-client-params.s3.ListObjectsV2", two_at_a_time, unique_id="pages")
    try:
        proxy.set()
        assert s3.list_objects(BASE, deadline=soon()) == {name: len(name.encode()) for name in names}
        assert len(proxy.requests("GET", "list-type")) == 5
    finally:
        client.meta.events.unregister("provide-client-params.s3.ListObjectsV2", unique_id="pages")
    assert s3.list_objects(BASE / "step", deadline=soon()) == {}


def two_at_a_time(params: dict[str, Any], **_: Any) -> dict[str, Any]:
    return params | {"MaxKeys": 2}


def test_more_than_a_thousand_objects_are_deleted_and_missing_ones_are_fine(s3: S3, proxy: FaultProxy) -> None:
    s3.put(BASE / "1500", b"", deadline=soon())
    s3.put(BASE / "kept", b"", deadline=soon())
    proxy.set()
    s3.delete((BASE / str(number) for number in range(1501)), deadline=soon())
    assert len(proxy.requests("POST", "delete")) == 2
    assert s3.list_objects(BASE, deadline=soon()) == {"kept": 0}
    s3.delete([], deadline=soon())


def test_an_object_that_is_there_is_not_replaced_by_a_new_one(s3: S3, proxy: FaultProxy) -> None:
    s3.put(BASE / "manifest", b"first", deadline=soon(), only_if_absent=True)
    with pytest.raises(AlreadyExists, match="s3://checkpoints/runs/one/manifest"):
        s3.put(BASE / "manifest", b"second", deadline=soon(), only_if_absent=True)
    assert s3.read(BASE / "manifest", deadline=soon()) == b"first"
    proxy.set(Rule(Fault(status=409, code="ConditionalRequestConflict"), "PUT", times=1))
    s3.put(BASE / "other", b"", deadline=soon(), only_if_absent=True)


# --- what travels


def test_every_upload_carries_its_crc32c_and_no_other_sum(s3: S3, proxy: FaultProxy) -> None:
    upload(s3)
    s3.put(BASE / "small", b"content", deadline=soon())
    s3.delete([BASE / "small"], deadline=soon())
    parts = proxy.requests("PUT", "partNumber")
    assert len(parts) == 6
    for part in parts:
        start = (int(part.query["partNumber"]) - 1) * PART_BYTES
        assert part.headers["x-amz-checksum-crc32c"] == crc32c_header(LARGE[start : start + PART_BYTES])
        assert part.headers["authorization"].startswith("AWS4-HMAC-SHA256")
    assert proxy.requests("PUT", "small")[0].headers["x-amz-checksum-crc32c"] == crc32c_header(b"content")
    for one in proxy.requests():
        sums = {name for name in one.headers if name.startswith("x-amz-checksum-")} - {"x-amz-checksum-algorithm"}
        assert sums <= {"x-amz-checksum-crc32c"} and "content-md5" not in one.headers
        assert "aws-chunked" not in one.headers.get("content-encoding", "")
    started = [one for one in proxy.requests("POST", "uploads") if "uploads" in one.query]
    assert [one.headers["x-amz-checksum-algorithm"] for one in started] == ["CRC32C"]


def test_at_most_four_parts_are_on_their_way(s3: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(Fault(read_bytes_per_second=10 * PART_BYTES), "PUT"))
    upload(s3, LARGE * 2)
    assert 2 <= proxy.most_at_once <= 4


def test_bodies_are_not_summed_twice_over_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of botocore here is seen in the request it would send; nothing is sent."""
    for name, value in environment("https://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3 = S3(limits=Limits(num_attempts=1, connect_seconds=0.2))
    seen: list[dict[str, bytes]] = []
    client = s3._requests._client()

    def look(request: Any, **_: Any) -> None:
        seen.append({name.lower(): value for name, value in request.headers.items()})

    client.meta.events.register("before-send.s3", look)
    with pytest.raises(StorageError, match="check the network"):
        s3.put(BASE / "x", b"content", deadline=soon())
    assert seen[0]["x-amz-content-sha256"] == b"UNSIGNED-PAYLOAD"
    assert seen[0]["x-amz-checksum-crc32c"] == crc32c_header(b"content").encode()
    assert "x-amz-trailer" not in seen[0]
    assert client.meta.config.s3["addressing_style"] == "virtual"  # the user's own settings stay


def test_parts_grow_so_that_ten_thousand_reach_five_tebibytes() -> None:
    s3 = S3(limits=LIMITS)
    for part_bytes in (6 * 2**20, 32 * 2**20):
        stream = s3.open_write(BASE / "x", deadline=soon(), part_bytes=part_bytes)
        sizes = [stream.part_size_bytes(number) for number in range(1, 10_001)]
        assert sizes[0] == part_bytes and max(sizes) <= 5 * 2**30
        assert sum(sizes) >= 5 * 2**40


# --- settings


def test_a_config_file_gives_credentials_region_and_endpoint(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with FaultProxy(server.endpoint) as proxy:
        (tmp_path / "config").write_text(f"[default]\nregion = eu-west-3\nendpoint_url = {proxy.endpoint}\n")
        (tmp_path / "credentials").write_text("[default]\naws_access_key_id = AKIAFILE\naws_secret_access_key = s\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        S3(limits=LIMITS).list_objects(BASE, deadline=soon())
        assert "Credential=AKIAFILE/" in proxy.seen[0].headers["authorization"]
        assert "/eu-west-3/s3/" in proxy.seen[0].headers["authorization"]


def test_the_environment_gives_credentials_region_and_endpoint(s3: S3, proxy: FaultProxy) -> None:
    s3.list_objects(BASE, deadline=soon())
    assert f"Credential={ACCESS_KEY}/" in proxy.seen[0].headers["authorization"]
    assert "/us-east-1/s3/" in proxy.seen[0].headers["authorization"]


def test_no_credentials_no_endpoint_and_no_profile_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=r"gave up at attempt 4 of 4.*AWS_ENDPOINT_URL"):
        S3(limits=LIMITS).read(BASE / "x", deadline=soon())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"reading s3://checkpoints/runs/one/x: .*boto3's standard chain"):
        S3(limits=LIMITS).read(BASE / "x", deadline=soon())
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"nobody.*boto3's standard chain"):
        S3(limits=LIMITS).read(BASE / "x", deadline=soon())
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):
        S3(limits=LIMITS).read(BASE / "x", deadline=soon())


# --- faults that pass


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=503), Fault(reset="before"), Fault(reset="after"), Fault(flip_upload=True),
     Fault(reset="middle"), Fault(truncate=True), Fault(status=400, code="RequestTimeout")],
    ids=["500", "503", "reset-before", "reset-after", "flip", "reset-middle", "truncate", "timeout"],
)  # fmt: skip
def test_uploads_survive_two_bad_tries_of_every_request(s3: S3, proxy: FaultProxy, fault: Fault) -> None:
    proxy.set(Rule(fault, times=2))
    upload(s3)
    s3.put(BASE / "small", b"content", deadline=soon())
    if not fault.flip_upload:  # else only bodies that carry a sum are refused
        assert len(proxy.requests("PUT", "partNumber")) == 18
    proxy.set()
    assert s3.read(BASE / "large", deadline=soon()) == LARGE
    assert s3.read(BASE / "small", deadline=soon()) == b"content"
    assert s3.abort_uploads(BASE, deadline=soon()) in (0, 1, 2)


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=503), Fault(reset="before"), Fault(reset="middle"), Fault(truncate=True)],
    ids=["500", "503", "reset-before", "reset-middle", "truncate"],
)
def test_downloads_listings_and_deletions_survive_two_bad_tries(s3: S3, proxy: FaultProxy, fault: Fault) -> None:
    upload(s3)
    proxy.set(Rule(fault, times=2))
    assert s3.read(BASE / "large", deadline=soon()) == LARGE
    assert s3.read_range(BASE / "large", 10, 200_000, deadline=soon()) == LARGE[10:200_010]
    assert s3.list_objects(BASE, deadline=soon()) == {"large": len(LARGE)}
    s3.delete([BASE / "large"], deadline=soon())
    proxy.set()
    assert s3.list_objects(BASE, deadline=soon()) == {}


def test_an_error_inside_200_ok_is_an_error(s3: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(Fault(error_in_200=True), "POST", "uploadId", times=2))
    upload(s3)
    assert len(proxy.requests("POST", "uploadId")) == 3
    proxy.set()
    assert s3.read(BASE / "large", deadline=soon()) == LARGE
    proxy.set(Rule(Fault(error_in_200=True), "POST", "uploadId"))
    with pytest.raises(StorageError, match=r"finishing s3://checkpoints/runs/one/other: gave up .*InternalError"):
        upload(s3, name="other")
    proxy.set()
    assert s3.abort_uploads(BASE, deadline=soon()) == 0


def test_an_upload_whose_last_answer_was_lost_is_found_to_be_there(s3: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(Fault(reset="after"), "POST", "uploadId", times=1), Rule(gone(), "POST", "uploadId"))
    upload(s3)
    assert len(proxy.requests("HEAD")) == 1
    proxy.set()
    assert s3.read(BASE / "large", deadline=soon()) == LARGE


def test_an_upload_that_somebody_aborted_is_not_taken_for_done(s3: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(gone(), "POST", "uploadId"))
    with pytest.raises(StorageError, match="NoSuchUpload"):
        upload(s3)
    proxy.set()
    upload(s3)  # an object of that name and size, but not of this upload
    proxy.set(Rule(gone(), "POST", "uploadId"))
    with pytest.raises(StorageError, match="NoSuchUpload"):
        upload(s3)


def gone() -> Fault:
    return Fault(status=404, code="NoSuchUpload")


def test_slow_is_not_broken(s3: S3, proxy: FaultProxy) -> None:
    content = LARGE[:30_000]
    proxy.set(
        Rule(Fault(bytes_per_second=60_000), "GET", "large"), Rule(Fault(read_bytes_per_second=200_000), "PUT", "large")
    )
    upload(s3, content)
    assert s3.read(BASE / "large", deadline=soon()) == content


# --- faults that stay


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=503), r"gave up at attempt 4 of 4, limit 20 s: S3 answered SlowDown"),
        (Fault(flip_upload=True), r"gave up at attempt 4 of 4, limit 20 s: S3 answered BadDigest"),
        (Fault(reset="before"), r"gave up at attempt 4 of 4.*check the network"),
        (Fault(status=403), r"writing part \d of s3://checkpoints/runs/one/large: S3 answered AccessDenied.*s3:PutObj"),
    ],
    ids=["503", "flip", "reset", "403"],
)
def test_an_upload_that_cannot_succeed_says_so_and_leaves_nothing(
    s3: S3, proxy: FaultProxy, fault: Fault, said: str
) -> None:
    proxy.set(Rule(fault, "PUT", "partNumber"))
    with pytest.raises(StorageError, match=said) as caught:
        upload(s3)
    assert not caught.value.shared_by_all_ranks
    assert bucket_is_clean(s3, proxy)


@pytest.mark.parametrize(
    "code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "RequestTimeTooSkewed"]
)
def test_a_refusal_is_final_at_the_first_answer(s3: S3, proxy: FaultProxy, code: str) -> None:
    proxy.set(Rule(Fault(status=403, code=code)))
    with pytest.raises(StorageError, match=rf"listing objects in s3://checkpoints/runs/one: S3 answered {code}.*check"):
        s3.list_objects(BASE, deadline=soon())
    assert len(proxy.seen) == 1


def test_a_bucket_that_is_not_there_is_named(s3: S3, proxy: FaultProxy) -> None:
    for method in (s3.read, s3.list_objects, s3.abort_uploads):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/x.*NoSuchBucket.*--s3_tier_base_path"):
            method(S3Uri("no-such-bucket", "x"), deadline=soon())
    assert len(proxy.seen) == 3


def test_a_key_that_may_not_be_deleted_is_named(s3: S3, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto deletes everything it is asked to, so the answer is taken from the file of S3's reference."""
    answers = [
        {"Errors": [{"Key": "a", "Code": "InternalError", "Message": "again"}]},
        {"Errors": [{"Key": "a", "Code": "AccessDenied", "Message": "no"}]},
    ]
    client = s3._requests._client()
    monkeypatch.setattr(client, "delete_objects", lambda **_: answers.pop(0))
    with pytest.raises(StorageError, match=r"deleting s3://checkpoints/a: S3 answered AccessDenied \(no\); check"):
        s3.delete([S3Uri(BUCKET, "a"), S3Uri(BUCKET, "b")], deadline=soon())
    assert not answers


def test_a_stalled_server_costs_no_more_than_the_deadline_and_one_time_out(
    s3: S3, hasty: S3, proxy: FaultProxy
) -> None:
    upload(s3, b"content", "small")
    hasty.read(BASE / "small", deadline=soon())  # its client is made, which takes a while on a busy machine
    proxy.set(Rule(Fault(stall=True), "GET"), Rule(Fault(stall=True), "PUT", "partNumber"))
    for doing, said in (
        (
            lambda: hasty.read(BASE / "small", deadline=Deadline.after(0.3)),
            "reading .*(limit 0.3 s: .*time|not done within 0.3 s)",
        ),
        (
            lambda: hasty.list_objects(BASE, deadline=Deadline.after(0.3)),
            "listing .*(limit 0.3 s: .*time|not done within 0.3 s)",
        ),
        (lambda: upload(hasty, deadline=Deadline.after(0.3)), "writing part . of .* 0.3 s"),
    ):
        proxy.seen.clear()
        with pytest.raises(StorageError, match=said):
            doing()
        assert 1 <= len(proxy.requests("GET")) + len(proxy.requests("PUT")) <= 4  # no attempt after the deadline
    proxy.release()
    proxy.set()
    assert s3.list_objects(BASE, deadline=soon()) == {"small": 7}
    assert s3.abort_uploads(BASE, deadline=soon()) == 0


def test_a_download_that_trickles_ends_at_the_deadline(s3: S3, proxy: FaultProxy) -> None:
    upload(s3)
    proxy.set(Rule(Fault(bytes_per_second=1000), "GET", "large"))
    with pytest.raises(StorageError, match=r"reading s3://.*: not done within 0.5 s"):
        s3.read(BASE / "large", deadline=Deadline.after(0.5))
    assert len(proxy.requests("GET", "large")) == 1


def test_an_upload_that_trickles_ends_at_the_deadline_and_leaves_nothing(hasty: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(Fault(read_bytes_per_second=1000), "PUT", "partNumber"))
    content = os.urandom(16 * 2**20)  # more than the sockets take
    with (
        pytest.raises(StorageError, match=r"not done within 0.4 s|limit 0.4 s"),
        hasty.open_write(BASE / "large", deadline=Deadline.after(0.4), part_bytes=15 * 2**20) as stream,
    ):
        stream.write(content)
    assert bucket_is_clean(hasty, proxy)


def test_a_flipped_download_is_handed_on_for_the_reader_to_find(s3: S3, proxy: FaultProxy) -> None:
    """The reason why every reader of checkpoints compares sums of its own."""
    upload(s3)
    proxy.set(Rule(Fault(flip_download=True), "GET", "large"))
    assert s3.read_range(BASE / "large", 0, len(LARGE), deadline=soon()) != LARGE


# --- uploads that do not end well


def test_a_block_that_raises_leaves_nothing(s3: S3, proxy: FaultProxy) -> None:
    for content in (b"less than a part", LARGE):
        with (
            pytest.raises(KeyError),
            s3.open_write(BASE / "large", deadline=soon(), part_bytes=PART_BYTES) as stream,
        ):
            stream.write(content)
            raise KeyError
        stream.close()
        with pytest.raises(ValueError, match="closed"):
            stream.write(b"more")
        assert bucket_is_clean(s3, proxy)


def test_a_stream_that_is_forgotten_does_not_make_an_object(s3: S3, proxy: FaultProxy) -> None:
    for content in (b"less than a part", LARGE):
        stream = s3.open_write(BASE / "large", deadline=soon(), part_bytes=PART_BYTES)
        stream.write(content)
        del stream
    assert s3.list_objects(BASE, deadline=soon()) == {}
    time.sleep(0.1)
    assert s3.abort_uploads(BASE, deadline=soon()) == 1


def test_writing_stops_at_the_first_part_that_fails(s3: S3, proxy: FaultProxy) -> None:
    proxy.set(Rule(Fault(status=403), "PUT", "partNumber"))
    num_written = 0
    with (
        pytest.raises(StorageError, match="AccessDenied"),
        s3.open_write(BASE / "large", deadline=soon(), part_bytes=PART_BYTES) as stream,
    ):
        for _ in range(100):
            stream.write(LARGE[:PART_BYTES])
            num_written += 1
    assert num_written <= 10
    assert bucket_is_clean(s3, proxy)


def test_an_abort_that_fails_is_a_warning_and_not_the_error(
    s3: S3, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.set(Rule(Fault(status=403), "PUT", "partNumber"), Rule(Fault(status=503), "DELETE"))
    with caplog.at_level(logging.WARNING, "hypershard"), pytest.raises(StorageError, match="AccessDenied"):
        upload(s3)
    assert "an unfinished upload of s3://checkpoints/runs/one/large stays in the bucket" in caplog.text
    proxy.set()
    assert s3.abort_uploads(BASE, deadline=soon()) == 1


def test_uploads_left_open_by_a_killed_process_are_found(s3: S3) -> None:
    client = s3._requests._client()
    for key in ("runs/one/a", "runs/one/b//c", "runs/one-more/d"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    assert s3.abort_uploads(BASE, deadline=soon()) == 2
    assert s3.abort_uploads(BASE, deadline=soon()) == 0
    assert s3.abort_uploads(S3Uri(BUCKET, ""), deadline=soon()) == 1


def test_many_threads_share_one_client(s3: S3) -> None:
    failed = []

    def work(number: int) -> None:
        content = LARGE[number : number + 2 * PART_BYTES]
        if s3.read(upload(s3, content, f"thread-{number}"), deadline=soon()) != content:
            failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(s3.list_objects(BASE, deadline=soon())) == 6


# --- the proxy, on whose judgement these tests rest


@pytest.mark.parametrize(("sum_of", "status"), [(b"content", 200), (b"other", 400)])
def test_the_proxy_checks_sums_that_follow_the_body(proxy: FaultProxy, sum_of: bytes, status: int) -> None:
    trailer = f"x-amz-checksum-crc32c:{crc32c_header(sum_of)}".encode()
    body = b"4\r\ncont\r\n3\r\nent\r\n0\r\n" + trailer + b"\r\n\r\n"
    scope = "Credential=AKIA/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    signed = {"Authorization": f"AWS4-HMAC-SHA256 {scope}"}  # moto reads it, and believes it
    headers = signed | {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Decoded-Content-Length": "7",
        "X-Amz-Trailer": "x-amz-checksum-crc32c",
        "X-Amz-Content-Sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    }
    for pieces in (body, iter([body[:9], body[9:]])):  # the second travels with Transfer-Encoding: chunked
        connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=10)
        connection.request("PUT", f"/{BUCKET}/runs/one/chunked", body=pieces, headers=headers)
        answer = connection.getresponse()
        assert (answer.status, b"BadDigest" in answer.read()) == (status, status == 400)
        connection.request("GET", f"/{BUCKET}/runs/one/chunked", headers=signed)  # the connection is kept
        answer = connection.getresponse()
        assert (answer.read() == b"content") == (status == 200)
        connection.close()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Content-MD5", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ("x-amz-checksum-crc32", "AAAAAA=="),
        ("x-amz-checksum-crc32c", "AAAAAA=="),
        ("x-amz-content-sha256", 64 * "0"),
    ],
)
def test_the_proxy_refuses_each_wrong_sum(proxy: FaultProxy, name: str, wrong: str) -> None:
    connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=10)
    connection.request("PUT", f"/{BUCKET}/runs/one/x", body=b"content", headers={name: wrong})
    answer = connection.getresponse()
    assert (answer.status, b" match " in answer.read()) == (400, True)
    connection.close()


# --- secrets


def test_no_secret_is_in_an_error_its_causes_or_the_log(
    s3: S3, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hypershard")
    told = ""
    for fault in (
        Fault(status=403, code="SignatureDoesNotMatch"),
        Fault(status=403, code="InvalidAccessKeyId"),
        Fault(status=503),
        Fault(reset="before"),
        Fault(reset="middle"),
    ):
        proxy.set(Rule(fault))
        for doing in (
            lambda: s3.read(BASE / "x", deadline=soon()),
            lambda: s3.put(BASE / "x", b"x", deadline=soon()),
            lambda: upload(s3),
        ):
            with pytest.raises(StorageError) as caught:
                doing()
            told += "".join(traceback.format_exception(caught.value))
            assert "?" not in str(caught.value) and "X-Amz" not in str(caught.value)
    told += caplog.text
    assert "SignatureDoesNotMatch" in told
    for secret in (ACCESS_KEY, SECRET_KEY, "Signature=", "Credential="):
        assert secret not in told
