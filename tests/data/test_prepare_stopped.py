"""Runs of `prepare` that are killed, interrupted or run out of disk, and the run that goes on after each."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_texts import documents, names_in, write_jsonl
from prepared import contents, prepared

from hypershard.data.bins import encoding_pool
from hypershard.data.bins.token_bins import verify
from hypershard.errors import DataError, HypershardError, StorageError

_STOPPED = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hypershard.data.bins import encoding_pool
from hypershard.data.bins import prepare as p
from hypershard.data.bins import unfinished
from prepared import prepared

if __name__ == "__main__":
    encoding_pool.BATCH_DOCUMENTS, p.JOURNAL_SECONDS, p.BYTES_PER_PROCESS = 7, 0.0, 1
    where, num_processes = sys.argv[4], int(sys.argv[5])
    def die(*args):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.killpg(0, signal.SIGINT) if where == "ctrl-c" else os.kill(os.getpid(), signal.SIGKILL)
    calls = []
    def progress(done):
        calls.append(done)
        if len(calls) == (9 if where == "ctrl-c" else int(where)):
            die()
    if where == "meta":
        p.write_json = die  # everything is on the disk but meta.json
    elif where == "cut":
        p.BinsWriter.finish = die  # val was copied and noted, train is still whole
    elif where == "publish":
        unfinished.sync_directory = die  # it has its name, and the journal is gone
    options = {"progress": progress} if where.isdigit() or where == "ctrl-c" else {}
    prepared(Path(sys.argv[2]), Path(sys.argv[3]), val_share=float(sys.argv[6]), num_processes=num_processes, **options)
"""


def stopped(path, output, where, *, num_processes=1, val_share=0.1):
    arguments = [str(Path(__file__).parent), path, output, where, num_processes, val_share]
    command = [sys.executable, "-c", _STOPPED, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, start_new_session=True, timeout=60)


@pytest.mark.parametrize("val_share", [0.1, 1e-9])
@pytest.mark.parametrize("where", ["1", "16", "20", "30", "cut", "meta"])
@pytest.mark.usefixtures("small_batches")
def test_a_killed_run_is_gone_on_with(tmp_path, text_folder, where, val_share):
    num_processes = 2 if where == "20" else 1
    prepared(text_folder, tmp_path / "whole", val_share=val_share)
    output = tmp_path / "bins"
    killed = stopped(text_folder, output, where, num_processes=num_processes, val_share=val_share)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists() and not (tmp_path / ".bins.partial" / "meta.json").exists()
    for pid in map(int, killed.stdout.split()):
        wait_for_end(pid)
    seen = []
    prepared(text_folder, output, val_share=val_share, progress=seen.append)
    if where != "1":
        assert seen[0].num_documents > 90  # not from the beginning
    assert contents(output) == contents(tmp_path / "whole")
    assert verify(output) == []
    assert names_in(tmp_path) == ["b", "bins", "text", "whole"]


def wait_for_end(pid):
    """Of a process whose parent was killed."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlives its parent")


def test_a_run_killed_after_it_was_complete_is_complete(tmp_path, text_folder):
    prepared(text_folder, tmp_path / "whole")
    assert stopped(text_folder, tmp_path / "bins", "publish").returncode == -signal.SIGKILL
    assert contents(tmp_path / "bins") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_the_work_and_workers_say_nothing(tmp_path, text_folder, small_batches):
    output = tmp_path / "bins"
    done = stopped(text_folder, output, "ctrl-c", num_processes=2)
    assert done.returncode == -signal.SIGINT and done.stderr.count("Traceback") == 1, done.stderr
    for pid in map(int, done.stdout.split()):
        wait_for_end(pid)
    seen = []
    prepared(text_folder, output, progress=seen.append)
    assert seen[0].num_documents > 50
    prepared(text_folder, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_a_killed_worker_is_one_clear_error_and_the_work_is_kept(tmp_path, text_folder, small_batches):
    others = set(multiprocessing.active_children())  # such as the ranks that other tests share

    def kill_workers(done):
        if done.num_documents > 50:
            for child in set(multiprocessing.active_children()) - others:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(
        HypershardError, match=r"2 processes that tokenise was killed.*--num_processes.*goes on from there"
    ):
        prepared(text_folder, tmp_path / "bins", num_processes=2, progress=kill_workers)
    seen = []
    prepared(text_folder, tmp_path / "bins", progress=seen.append)
    assert seen[0].num_documents > 50
    prepared(text_folder, tmp_path / "whole")
    assert contents(tmp_path / "bins") == contents(tmp_path / "whole")


def interrupted(path, output, **options):
    """A run that stops after some documents."""

    def stop(done):
        if done.num_documents > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(path, output, progress=stop, **options)


@pytest.mark.parametrize("damage", ["options", "file", "journal", "bins", "no journal"])
def test_leftovers_that_do_not_fit_are_dropped(tmp_path, text_folder, small_batches, damage):
    interrupted(text_folder, tmp_path / "bins", seed=1 if damage == "options" else 0)
    partial = tmp_path / ".bins.partial"
    if damage == "file":
        write_jsonl(text_folder / "a.jsonl", documents(99))
    elif damage == "journal":
        (partial / "journal.json").write_text('{"identity"')
    elif damage == "bins":
        os.truncate(partial / "train.bin", 10)
    elif damage == "no journal":
        (partial / "journal.json").unlink()
    seen = []
    prepared(text_folder, tmp_path / "bins", progress=seen.append)
    assert seen[0].num_documents == 7
    prepared(text_folder, tmp_path / "whole")
    assert contents(tmp_path / "bins") == contents(tmp_path / "whole")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, text_folder, small_batches):
    def grow(done):
        if done.num_documents > 150:
            with open(text_folder / "a.jsonl", "a") as file:
                file.write("\n")

    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        prepared(text_folder, tmp_path / "bins", progress=grow)
    assert names_in(tmp_path) == ["b", "text"]


def test_a_file_the_system_refuses_to_grow_is_one_storage_error(tmp_path, small_batches):
    path = write_jsonl(tmp_path / "a.jsonl", documents() * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match="writing token bins into"):
            prepared(path, tmp_path / "bins")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "bins").exists()


def test_a_full_disk_is_one_storage_error_and_room_lets_it_go_on(tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(encoding_pool, "BATCH_DOCUMENTS", 100)
    path = write_jsonl(tmp_path / "a.jsonl", documents(900))
    (small_disk / "ballast").write_bytes(b"0" * 200_000)
    with pytest.raises(StorageError, match="no space left on the disk"):
        prepared(path, small_disk / "bins")
    assert names_in(small_disk) == [".bins.partial", "ballast"]
    (small_disk / "ballast").unlink()
    seen = []
    prepared(path, small_disk / "bins", progress=seen.append)
    assert seen[0].num_documents > 100
    prepared(path, tmp_path / "whole")
    assert contents(small_disk / "bins") == contents(tmp_path / "whole")
