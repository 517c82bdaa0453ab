"""Whole runs on a mixed, shuffled, packed stream: resumed on other ranks, robbed of workers, given other files."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import BUCKET
from tests.hub_server import Busy, HubServer, Repository
from tests.integration.processes import command, environment, finish, start, train, train_well
from tests.s3_server import Fault, FaultProxy, Rule, Server

from hypershard.data.embedded import CORPUS_PATH, TOKENIZER_PATH
from hypershard.metrics.sinks import read_json_lines
from hypershard.s3 import S3, Deadline, S3Uri

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two files to stream, mixed with the embedded text, which is streamed too."""
    folder = tmp_path_factory.mktemp("stream")
    import lzma

    lines = lzma.decompress(CORPUS_PATH.read_bytes()).splitlines(keepends=True)
    data = folder / "text"
    data.mkdir()
    for number in range(2):
        (data / f"{number}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[number:600:2])))
    return {
        "dataset": f"{data}:0.7,embedded:0.3",
        "streaming": 1,
        "shuffle_window": 20,
        "cache_dir": folder / "cache",
        "checkpoint_freq": 3,
        "lr_decay_iters": 12,
    }


def samples_of(run_dir: Path, steps: int) -> list[dict[str, Any]]:
    """Position and token ids of all samples of the steps, as `hypershard data ledger` reads them back."""
    words = ["data", "ledger", str(run_dir), "--step", "1", "--last", str(steps), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "hypershard.cli.main", *words],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def losses_of(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_json_lines(run_dir / "metrics.jsonl") if "loss" in record}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train_well(**settings, run_dir=run_dir, nproc_per_node=1, gradient_accumulation_steps=4, max_steps=12)
    return run_dir


def test_resumed_on_4_and_2_ranks_every_step_trains_on_the_same_tokens(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for num_ranks, last_step in ((1, 4), (4, 9), (2, 12)):
        train_well(
            **settings,
            run_dir=run_dir,
            nproc_per_node=num_ranks,
            gradient_accumulation_steps=4 // num_ranks,
            max_steps=last_step,
            num_workers=num_ranks % 4 % 2,
            resume_from_checkpoint="auto",
        )
    expected, found = samples_of(undisturbed, 12), samples_of(run_dir, 12)
    assert len(found) == 12 * 8
    assert len({sample["source"] for sample in found}) == 2
    assert [sample["tokens"] for sample in found] == [sample["tokens"] for sample in expected]
    # Equal samples, so equal losses but for the order in which float32 sums over ranks are added up.
    assert losses_of(run_dir) == pytest.approx(losses_of(undisturbed), rel=1e-4)


def test_a_killed_loader_worker_changes_nothing(settings: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(
        command(
            **settings, run_dir=run_dir, nproc_per_node=1, gradient_accumulation_steps=4, max_steps=12, num_workers=1
        )
    )
    deadline = time.monotonic() + 120
    while 3 not in losses_of(run_dir):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)[1]
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True
    )
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert "a loader worker ended with exit code -9" in output
    assert losses_of(run_dir) == losses_of(undisturbed)


C4_CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: de
  data_files: de/*.json.gz
---
"""


def test_a_hub_that_is_busy_is_asked_once_a_node_and_streamed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(settings["dataset"]).partition(":")[0])
    files = {
        f"en/c4-train.{number:05}-of-00002.json.gz": (folder / f"{number}.jsonl.gz").read_bytes() for number in (0, 1)
    }
    files |= {"en/c4-validation.00000-of-00001.json.gz": files["en/c4-train.00000-of-00002.json.gz"]}
    files |= {"de/c4-train.json.gz": b"", "README.md": C4_CARD}
    with HubServer() as hub:
        hub.datasets["allenai/c4"] = Repository(files)
        hub.models["org/model"] = Repository({"tokenizer.json": TOKENIZER_PATH.read_bytes()})
        hub.busy += [Busy("api/datasets", times=2, headers={"Retry-After": "1"}), Busy("resolve", times=2, status=503)]
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        changes = {"dataset": "allenai/c4", "dataset_config_name": "en", "tokenizer": "org/model", "streaming": None}
        flags = settings | changes | {"cache_dir": tmp_path / "cache", "run_dir": tmp_path / "run"}
        output = train_well(**flags, nproc_per_node=2, num_workers=1, max_steps=4)
        assert "asks to wait" in output or "again in" in output, output
        listings = [seen for seen in hub.seen if "/tree/" in seen.path]
        assert 0 < len(listings) <= 2 + 2, "one listing of two pages for all processes, and what was refused"
        assert len(samples_of(tmp_path / "run", 1)) == 4


def test_a_stream_from_s3_goes_on_through_errors(
    settings: dict[str, Any], s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(settings["dataset"]).partition(":")[0])
    base = S3Uri(BUCKET, "texts/stream")
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for path in folder.iterdir():
            S3().put(base / path.name, path.read_bytes(), deadline=Deadline.after(30))
        local = settings | {"dataset": folder, "run_dir": tmp_path / "local", "nproc_per_node": 1}
        train_well(**local, max_steps=4)
        proxy.set(Rule(Fault(status=500), "GET", "jsonl.gz", times=2))
        remote = settings | {"dataset": str(base), "streaming": None, "run_dir": tmp_path / "s3", "nproc_per_node": 1}
        train_well(**remote, max_steps=4)
        assert len(list(proxy.requests("GET", "jsonl.gz"))) > 2
    assert losses_of(tmp_path / "s3") == losses_of(tmp_path / "local")


def test_other_files_are_refused_at_resume_unless_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{number} " + "some words of a little text " * 9}) for number in range(300)]
    data.write_text("\n".join(lines))
    flags = settings | {"dataset": data, "run_dir": tmp_path / "run", "nproc_per_node": 1}
    train_well(**flags, max_steps=3)
    data.write_text("\n".join([*lines, lines[0]]))
    code, output = train(**flags, max_steps=5, resume_from_checkpoint="auto")
    assert code == 2, output
    assert "fingerprint was" in output and "--restart_data=1" in output
    output = train_well(**flags, max_steps=5, resume_from_checkpoint="auto", restart_data=1)
    assert "reading starts at their beginning" in output
