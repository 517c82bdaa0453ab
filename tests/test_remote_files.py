from __future__ import annotations

import gzip
import logging
import random

import boto3
import pytest
from botocore.config import Config

from hypershard.errors import DataError, StorageError
from hypershard.remote_files import Patience, list_files, open_file
from tests.conftest import BUCKET
from tests.s3_server import Fault, FaultProxy, Rule

CONTENT = random.Random(3).randbytes(300_000)
# Short enough for a test; what is tried is that each limit acts.
QUICK = Patience(connect_seconds=1, read_seconds=0.5, num_attempts=4, first_wait_seconds=0.02, longest_wait_seconds=0.1)


@pytest.fixture
def bucket(s3_server, own_connections):
    """Puts objects, and gives their s3:// location."""
    client = boto3.client("s3", endpoint_url=s3_server.endpoint, config=Config(retries={"max_attempts": 1}))

    def put(key, content=CONTENT):
        client.put_object(Bucket=BUCKET, Key=key, Body=content)
        return f"s3://{BUCKET}/{key}"

    return put


@pytest.fixture
def proxy(s3_server, bucket, monkeypatch):
    with FaultProxy(s3_server.endpoint) as one:
        monkeypatch.setenv("AWS_ENDPOINT_URL", one.endpoint)
        yield one


def read_all(location, **more):
    with open_file(location, **more) as file:
        return file.read()


def test_a_local_file_is_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    assert read_all(str(path)) == CONTENT
    assert read_all(str(path), size_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(DataError, match="found 300000 bytes; expected the 300001 it had when it was listed"):
        open_file(str(path), size_bytes=len(CONTENT) + 1)


def test_an_object_is_read_and_sought_as_a_file(bucket):
    location = bucket("seek/a")
    assert read_all(location) == CONTENT
    with open_file(location, size_bytes=len(CONTENT)) as file:
        assert file.seek(-8, 2) == len(CONTENT) - 8 and file.read() == CONTENT[-8:]
        assert file.seek(1000) == 1000 and file.read(5) == CONTENT[1000:1005] and file.tell() == 1005
        assert file.seek(len(CONTENT) + 5) and file.read() == b""
    with gzip.open(open_file(bucket("seek/a.gz", gzip.compress(CONTENT)))) as file:
        assert file.read() == CONTENT


def test_a_large_read_is_made_of_several_requests(bucket, proxy, monkeypatch):
    from hypershard.remote_files import opened

    monkeypatch.setattr(opened, "_LARGEST_REQUEST_BYTES", 100_000)
    monkeypatch.setattr(opened, "_BUFFER_BYTES", 1000)
    location = bucket("large/a")
    proxy.set(Rule(Fault(reset="middle"), words="large/a", times=1))
    assert read_all(location, size_bytes=len(CONTENT), patience=QUICK) == CONTENT
    assert {one.headers["range"] for one in proxy.requests("GET", "large/a")} == {
        "bytes=0-99999", "bytes=100000-199999", "bytes=200000-299999",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(reset="before"),
        Fault(reset="middle"),
        Fault(truncate=True),
        Fault(stall=True),
    ],
    ids=lambda fault: str({name: value for name, value in vars(fault).items() if value}),
)
def test_what_passes_is_asked_again_and_what_does_not_is_named(bucket, proxy, fault, caplog):
    caplog.set_level(logging.WARNING, logger="hypershard")
    location = bucket("faults/a")
    proxy.set(Rule(fault, "GET", "faults/a", times=2))
    assert read_all(location, size_bytes=len(CONTENT), patience=QUICK) == CONTENT
    assert len(proxy.requests("GET", "faults/a")) == 3
    proxy.set(Rule(fault, "GET", "faults/a"))
    with pytest.raises(StorageError, match=rf"reading {location} at byte 0: .+; gave up after 4 attempts"):
        read_all(location, size_bytes=len(CONTENT), patience=QUICK)
    # The HTTP client makes a request again by itself, once, when its connection closes without an answer.
    assert len(proxy.requests("GET", "faults/a")) == (8 if fault.reset == "before" else 4)
    proxy.release()


def test_what_does_not_pass_is_said_at_once(bucket, proxy):
    location = bucket("refused/a")
    proxy.set(Rule(Fault(status=403), "GET", "refused/a"))
    with pytest.raises(DataError, match=r"refused.*s3:GetObject"):
        read_all(location, size_bytes=len(CONTENT), patience=QUICK)
    assert len(proxy.requests("GET", "refused/a")) == 1
    proxy.set()
    with pytest.raises(DataError, match="no such object"):
        read_all(f"s3://{BUCKET}/refused/none", patience=QUICK)
    with pytest.raises((DataError, StorageError), match="at byte 0"):
        read_all(location, size_bytes=len(CONTENT) + 1, patience=QUICK)


def test_a_listing_is_sorted_whole_and_changes_with_the_content(bucket, proxy):
    names = [f"list/{i:04}" for i in (3, 1, 2)]
    for name in names:
        bucket(name, name.encode())
    bucket("list/deep/x", b"x")
    bucket("listing", b"not below it")
    proxy.set(Rule(Fault(status=500), "GET", "list-type", times=1))
    found = list_files(f"s3://{BUCKET}/list", patience=QUICK)
    assert [file.location.removeprefix(f"s3://{BUCKET}/") for file in found] == [*sorted(names), "list/deep/x"]
    assert [file.size_bytes for file in found] == [9, 9, 9, 1]
    bucket(names[0], b"different")
    again = list_files(f"s3://{BUCKET}/list/", patience=QUICK)
    assert [file.version != old.version for file, old in zip(again, found, strict=True)] == [False, False, True, False]
    assert [file.location for file in list_files(f"s3://{BUCKET}/listing", patience=QUICK)] == [
        f"s3://{BUCKET}/listing"
    ]
    assert list_files(f"s3://{BUCKET}/nothing", patience=QUICK) == []
    assert {file.location for file in found} <= {file.location for file in list_files(f"s3://{BUCKET}")}
    with pytest.raises(DataError, match="no such object or bucket"):
        list_files("s3://no-such-bucket/x", patience=QUICK)


def test_without_credentials_it_says_where_they_are_looked_for(bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match="credentials"):
        list_files(f"s3://{BUCKET}/list", patience=QUICK)


def test_another_scheme_is_refused():
    with pytest.raises(DataError, match=r"expected a path, s3://"):
        open_file("gs://bucket/a")
