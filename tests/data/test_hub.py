"""The hub's listings and tokenizers, from a stand-in hub on loopback."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
from tests.hub_server import TOKEN, Busy, HubServer, Repository
from tests.s3_server import Fault, FaultProxy, Rule

from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.read import hub
from hypershard.data.read.files import find_files
from hypershard.data.read.hub import fetch_tokenizer, list_dataset
from hypershard.errors import DataError, StorageError
from hypershard.remote_files import Patience, hub_request, open_file

CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# A set\n"
BIG = b'{"text": "a line"}\n' * 500


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as one:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", one.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # Each test asks as if the last question were long ago; those about freshness set it again.
        monkeypatch.setattr(hub, "_FRESH_SECONDS", 0.0)
        files = {f"data/train-{i:05}.jsonl": BIG + b"%d" % i for i in range(6)} | {"data/test-0.jsonl": BIG}
        one.datasets["org/set"] = Repository(files | {"README.md": CARD, ".gitattributes": b"*"})
        tokenizer = TOKENIZER_PATH.read_bytes()
        one.models["org/model"] = Repository({"tokenizer.json": tokenizer, "config.json": b"{}", "model.bin": BIG})
        yield one


def test_all_pages_of_a_listing_at_one_commit(server, tmp_path):
    found = list_dataset("org/set", cache_dir=tmp_path)
    repository = server.datasets["org/set"]
    assert (found.name, found.commit, found.readme) == ("org/set", repository.commit, CARD.decode())
    assert {file.path: file.size_bytes for file in found.files} == {
        path: len(content) for path, content in repository.files.items()
    }
    versions = {file.path: file.version for file in found.files}
    assert versions["data/test-0.jsonl"] == hashlib.sha256(BIG).hexdigest()  # large: by content
    assert versions[".gitattributes"] == hashlib.sha1(b"blob 1\0*").hexdigest()  # small: git's blob
    assert list_dataset(f"org/set@{repository.commit}", cache_dir=tmp_path) == found


def test_the_stand_in_speaks_as_the_library_expects(server, tmp_path):
    api = huggingface_hub.HfApi(endpoint=server.endpoint)
    found = list_dataset("org/set", cache_dir=tmp_path)
    entries = api.list_repo_tree("org/set", repo_type="dataset", revision=found.commit, recursive=True)
    listed = [
        (entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if hasattr(entry, "size")  # folders have none
    ]
    assert listed == [(file.path, file.size_bytes, file.version) for file in found.files]
    assert api.dataset_info("org/set", revision="main").sha == found.commit
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        api.dataset_info("org/none", revision="main")


def test_the_same_commit_is_not_listed_again_and_a_new_one_is(server, tmp_path):
    first = list_dataset("org/set", cache_dir=tmp_path)
    num_pages = len(server.requests("/tree/"))
    assert num_pages == 3
    assert list_dataset("org/set", cache_dir=tmp_path) == first
    assert len(server.requests("/tree/")) == num_pages and len(server.requests("/revision/")) == 2
    server.datasets["org/set"].files["data/train-00006.jsonl"] = BIG
    assert len(list_dataset("org/set", cache_dir=tmp_path).files) == len(first.files) + 1
    assert list_dataset("org/set", cache_dir=tmp_path).commit != first.commit


def test_a_hub_name_becomes_files_that_can_be_read(server, tmp_path):
    files = find_files("org/set", dataset_config_name=None, cache_dir=tmp_path)
    commit = server.datasets["org/set"].commit
    assert [file.location for file in files] == [
        f"hf://datasets/org/set@{commit}/data/train-{i:05}.jsonl" for i in range(6)
    ]
    assert {file.split for file in files} == {"train"}
    with open_file(files[3].location, size_bytes=files[3].size_bytes) as file:
        assert file.read() == BIG + b"3"
    with open_file(files[3].location) as file:
        assert file.seek(-1, 2) and file.read() == b"3"
    assert find_files("hf://datasets/org/set", dataset_config_name=None, cache_dir=tmp_path) == files


def test_a_signed_address_is_used_until_it_runs_out(server, tmp_path, monkeypatch):
    from hypershard.remote_files import opened

    monkeypatch.setattr(opened, "_LARGEST_REQUEST_BYTES", 2000)
    monkeypatch.setattr(opened, "_BUFFER_BYTES", 100)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.datasets["org/set"].gated = True
    files = find_files("org/set", dataset_config_name=None, cache_dir=tmp_path)
    with open_file(files[0].location, size_bytes=files[0].size_bytes) as file:
        content = file.read(4000)
        assert len(server.requests("/resolve/")) == 2  # README.md, and this file once
        server.signature = "second"
        content += file.read()
    assert content == BIG + b"0"
    assert len(server.requests("/resolve/")) == 3
    signed = server.requests("/signed/")
    assert len(signed) >= 6 and all("authorization" not in one.headers for one in signed)
    assert all(one.headers["authorization"] == f"Bearer {TOKEN}" for one in server.requests("/resolve/"))


def test_an_old_name_is_read_under_its_new_one(server, tmp_path):
    server.renamed["set"] = "org/set"
    assert list_dataset("set", cache_dir=tmp_path).name == "org/set"


def test_busy_is_waited_out_as_long_as_asked(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hypershard")
    server.busy = [
        Busy("/revision/", times=1, headers={"Retry-After": "1"}),
        Busy("/tree/", times=1, headers={"RateLimit": '"api";r=0;t=1'}),
        Busy("/resolve/", times=1, status=503),
    ]
    started_at = time.monotonic()
    assert list_dataset("org/set", cache_dir=tmp_path).commit
    assert time.monotonic() - started_at >= 2
    waits = [record.getMessage() for record in caplog.records if "trying again in" in record.getMessage()]
    assert len(waits) == 3 and "answered 429" in waits[0] and "answered 503" in waits[2]


def test_patience_ends(server):
    server.busy = [Busy("/api/", times=100, headers={"Retry-After": "60"})]
    url = f"{server.endpoint}/api/datasets/org/set/revision/main"
    with pytest.raises(StorageError, match=r"asking: .* answered 429; gave up after 1 attempts"):
        hub_request("asking", url, patience=Patience(total_seconds=30))
    with pytest.raises(StorageError, match=r"cannot be reached .*gave up after 2 attempts"):
        hub_request("asking", "http://127.0.0.1:9/", patience=Patience(num_attempts=2, first_wait_seconds=0.01))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", r"--dataset=org/none: .*has no such name, or it is private and no token is in use"),
        ("org/set@other", "not this revision"),
        ("org/gated", r"it is gated, and no token is in use; accept its terms .*HF_TOKEN"),
    ],
)
def test_refusals_say_what_to_do_and_are_not_repeated(server, tmp_path, name, said):
    server.datasets["org/gated"] = Repository({"a.jsonl": BIG}, gated=True)
    with pytest.raises(DataError, match=said):
        list_dataset(name, cache_dir=tmp_path)
    assert len(server.requests()) == 1


def test_a_password_in_the_address_is_not_printed(server, tmp_path, monkeypatch, caplog):
    address = server.endpoint.replace("http://", "http://user:secret@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    server.busy = [Busy("/revision/", times=1, status=500)]
    (file, *_) = find_files("org/set", dataset_config_name=None, cache_dir=tmp_path)
    with open_file(file.location, size_bytes=file.size_bytes) as opened:
        assert opened.read() == BIG + b"0"
    with pytest.raises(DataError, match="no such name") as refused:
        list_dataset("org/none", cache_dir=tmp_path)
    assert "secret" not in f"{refused.value}{caplog.text}{list(tmp_path.rglob('*'))}"


def test_what_is_no_hub_is_said(server, tmp_path):
    server.busy = [Busy("/revision/", times=1, status=200, headers={"Content-Type": "text/html"})]
    with pytest.raises(DataError, match=r"answered text/html; expected JSON"):
        list_dataset("org/set", cache_dir=tmp_path)


@pytest.mark.parametrize("fault", [Fault(reset="middle"), Fault(truncate=True), Fault(stall=True), Fault(status=500)])
def test_a_read_that_fails_is_made_again_and_then_named(server, monkeypatch, fault):
    content = b"x" * 900
    server.datasets["org/small"] = Repository({"a.jsonl": content})
    location = f"hf://datasets/org/small@{server.datasets['org/small'].commit}/a.jsonl"
    patience = Patience(read_seconds=0.3, num_attempts=3, first_wait_seconds=0.02, total_seconds=1.5)
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", proxy.endpoint)
        proxy.set(Rule(fault, words="a.jsonl", times=2))
        with open_file(location, size_bytes=900, patience=patience) as file:
            assert file.read() == content
        assert len(proxy.requests()) == 3
        proxy.set(Rule(fault, words="a.jsonl"))
        with (
            open_file(location, size_bytes=900, patience=patience) as file,
            pytest.raises(StorageError, match=rf"reading {location} at byte 0: .*gave up after"),
        ):
            file.read()
        proxy.release()


def test_a_token_opens_a_gated_set_and_is_never_printed(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="hypershard")
    server.datasets["org/gated"] = Repository({"a.jsonl": BIG}, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.busy = [Busy("/revision/", times=1, status=500)]
    assert find_files("org/gated", dataset_config_name=None, cache_dir=tmp_path)[0].size_bytes == len(BIG)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(DataError, match="has no access") as refused:
        list_dataset("org/gated", cache_dir=tmp_path / "other")
    assert "hf_" not in f"{refused.value}{caplog.text}"


def test_offline_with_a_cache_goes_on_and_without_says_what_to_do(server, tmp_path, monkeypatch, caplog):
    first = list_dataset("org/set", cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert list_dataset("org/set", cache_dir=tmp_path) == first
    assert f"what the hub said on {time.strftime('%Y-%m-%d')}" in caplog.text
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*nothing is in the cache.*--cache_dir"):
        list_dataset("org/set", cache_dir=tmp_path / "other")
    location = find_files("org/set", dataset_config_name=None, cache_dir=tmp_path)[0].location
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        open_file(location, size_bytes=5).read()


def test_a_hub_that_is_gone_is_as_offline(server, tmp_path, monkeypatch, caplog):
    first = list_dataset("org/set", cache_dir=tmp_path)
    monkeypatch.setattr(hub, "_PATIENCE_WITH_CACHE", Patience(num_attempts=2, first_wait_seconds=0.01))
    server.busy = [Busy("/api/", times=100, status=429, headers={"Retry-After": "1000"})]
    assert list_dataset("org/set", cache_dir=tmp_path) == first
    assert "going on with what the hub said" in caplog.text


def test_what_hf_download_fetched_is_read_without_the_hub(server, tmp_path, monkeypatch):
    (file, *_) = find_files("org/set", dataset_config_name=None, cache_dir=tmp_path)
    commit = server.datasets["org/set"].commit
    kept = tmp_path / "hf" / "datasets--org--set" / "snapshots" / commit / "data"
    kept.mkdir(parents=True)
    (kept / "train-00000.jsonl").write_bytes(BIG + b"0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with open_file(file.location, size_bytes=file.size_bytes) as opened:
        assert opened.read() == BIG + b"0"


def test_many_processes_at_once_make_one_listing(server, tmp_path):
    server.busy = [Busy("/revision/", times=1, headers={"Retry-After": "1"})]
    code = (
        "import sys; from pathlib import Path; from hypershard.data.read.files import find_files;"
        "print(len(find_files('org/set', dataset_config_name=None, cache_dir=Path(sys.argv[1]))))"
    )
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["6"] * 3
    assert len(server.requests("/revision/")) == 2  # the first was refused
    assert len(server.requests("/tree/")) == 3


def test_a_models_tokenizer_is_fetched_once(server, tmp_path, monkeypatch):
    model = server.models["org/model"]
    model.files["tokenizer_config.json"] = b'{"eos_token": "<|endoftext|>"}'
    folder = fetch_tokenizer("org/model", cache_dir=tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == TOKENIZER_PATH.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    num_requests = len(server.requests("/resolve/"))
    assert fetch_tokenizer("org/model", cache_dir=tmp_path) == folder
    assert len(server.requests("/resolve/")) == num_requests == 2
    (tmp_path / "hub").rename(tmp_path / "gone")
    assert fetch_tokenizer("org/model", cache_dir=tmp_path) == folder
    model.files["chat_template.jinja"] = b"{{ messages }}"
    newer = fetch_tokenizer("org/model", cache_dir=tmp_path)
    assert newer != folder and (newer / "chat_template.jinja").is_file()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_tokenizer("org/model", cache_dir=tmp_path) == newer


def test_a_model_without_a_tokenizer_is_refused(server, tmp_path):
    server.models["org/bare"] = Repository({"model.safetensors": BIG})
    with pytest.raises(DataError, match=r"--tokenizer=org/bare: .*found model\.safetensors; expected tokenizer\.json"):
        fetch_tokenizer("org/bare", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"--tokenizer=/no/such/path: found nothing there"):
        fetch_tokenizer("/no/such/path", cache_dir=tmp_path)


def test_without_a_card_the_most_common_format_is_read(server, tmp_path, caplog):
    server.datasets["org/bare"] = Repository({"a.parquet": BIG, "b.parquet": BIG, "LICENSE.txt": b"...", "c.csv": b""})
    files = find_files("org/bare", dataset_config_name=None, cache_dir=tmp_path)
    assert [file.name for file in files] == ["a.parquet", "b.parquet"]
    assert "not 1 txt" in caplog.text
