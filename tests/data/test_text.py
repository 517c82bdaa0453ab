from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_texts import documents, names_in, write_jsonl
from prepared import listed, spec_of

from hypershard.data.bins.text import prepare_text
from hypershard.data.bins.token_bins import open_token_bins, verify
from hypershard.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", documents())


def cached(corpus, tmp_path, *, text_field="text", val_share=0.01, malformed_rows="refuse"):
    return prepare_text(
        listed(corpus), tmp_path / "cache", spec_of(text_field), val_share=val_share, malformed_rows=malformed_rows
    )


def test_text_is_tokenised_once(corpus, tmp_path):
    folder = cached(corpus, tmp_path)
    written_at = (folder / "train.bin").stat().st_mtime_ns
    assert cached(corpus, tmp_path) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == written_at
    assert names_in(tmp_path / "cache") == [folder.name]
    assert cached(corpus, tmp_path, val_share=0.5) != folder


def test_a_changed_file_is_tokenised_again_and_its_fingerprint_changes(corpus, tmp_path):
    before = cached(corpus, tmp_path)
    changed = documents()
    changed[0] = changed[0].replace(changed[0][0], "#", 1)
    size_bytes = corpus.stat().st_size
    write_jsonl(corpus, changed)
    os.utime(corpus, ns=(0, corpus.stat().st_mtime_ns + 1))  # clocks of file systems may be coarse
    assert corpus.stat().st_size == size_bytes
    after = cached(corpus, tmp_path)
    assert after != before
    assert open_token_bins(after)[0].fingerprint != open_token_bins(before)[0].fingerprint


def test_a_touched_file_keeps_its_fingerprint(corpus, tmp_path):
    before = open_token_bins(cached(corpus, tmp_path))[0].fingerprint
    os.utime(corpus, ns=(0, 1))
    assert open_token_bins(cached(corpus, tmp_path))[0].fingerprint == before


def test_another_text_field_is_another_folder(corpus, tmp_path):
    cached(corpus, tmp_path)
    with pytest.raises(DataError, match="--text_field"):
        cached(corpus, tmp_path, text_field="content")


def test_a_file_that_changed_since_it_was_listed_is_refused(corpus, tmp_path):
    files = listed(corpus)
    with open(corpus, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: found|changed while it was read"):
        prepare_text(files, tmp_path / "cache", spec_of(), val_share=0.01, malformed_rows="refuse")
    assert not any(name for name in names_in(tmp_path / "cache") if not name.startswith("."))


def test_rows_left_out_by_an_earlier_run_are_not_hidden(corpus, tmp_path):
    with open(corpus, "a") as file:
        file.write("{cut\n")
    cached(corpus, tmp_path, malformed_rows="skip")
    with pytest.raises(DataError, match=r"1 malformed rows were left out.*--malformed_rows=skip"):
        cached(corpus, tmp_path)


_PREPARE_TEXT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hypershard.data.bins import text
from hypershard.log import setup_logging
from prepared import listed, spec_of

def wait_for_the_other(done):
    print("reading", flush=True)
    while not Path(sys.argv[4]).exists():
        time.sleep(0.01)

setup_logging()
text.log_progress = lambda: wait_for_the_other
files, cache_dir = listed(Path(sys.argv[2])), Path(sys.argv[3])
print(text.prepare_text(files, cache_dir, spec_of(), val_share=0.01, malformed_rows="refuse"))
"""


def test_of_two_processes_that_want_the_same_one_waits(corpus, tmp_path):
    arguments = [Path(__file__).parent, corpus, tmp_path / "cache", tmp_path / "go"]
    command = [sys.executable, "-c", _PREPARE_TEXT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "reading\n"
        with subprocess.Popen(command, **pipes) as second:
            assert "tokenising" in second.stderr.readline()
            assert "waiting for it" in second.stderr.readline()
            (tmp_path / "go").touch()
            folder = first.communicate(timeout=30)[0].splitlines()[-1]
            assert second.communicate(timeout=30)[0].splitlines() == [folder]  # which read nothing
    assert names_in(tmp_path / "cache") == [Path(folder).name]
    assert verify(Path(folder)) == []
