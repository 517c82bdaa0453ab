from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_texts import documents, names_in, write_jsonl

from hypershard.data import prepare as prepare_file
from hypershard.data.prepare import prepare, process_space
from hypershard.data.token_bins import open_token_bins
from hypershard.errors import DataError, StorageError


def decoded(source, tokenizer):
    """The documents of a split."""
    tokens = source.read(0, source.num_tokens)
    ends = np.flatnonzero(tokens == source.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.backend.decode(part.tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def without_end(texts):
    return [text.removesuffix("<|endoftext|>") for text in texts]


def test_every_document_is_written_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_file, "BATCH_PIECES", 7)  # many batches
    texts = [f"{i}: {text}" for i, text in enumerate(documents(300))]
    meta = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "bins", tokenizer, val_share=0.1)
    train, val = open_token_bins(tmp_path / "bins")
    train_texts, val_texts = without_end(decoded(train, tokenizer)), without_end(decoded(val, tokenizer))
    assert sorted(train_texts + val_texts) == sorted(texts)
    assert train_texts == sorted(train_texts, key=texts.index)  # in the order of the file
    assert 10 < len(val_texts) == meta.val.num_documents < 60
    assert meta.train.num_documents == len(train_texts)


def test_the_split_depends_on_its_seed_alone(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents(200))
    metas = [
        prepare([path], tmp_path / f"bins{i}", tokenizer, val_share=0.2, seed=seed) for i, seed in enumerate((1, 1, 2))
    ]
    assert metas[0] == metas[1] != metas[2]


def test_files_named_val_are_the_val_split(tmp_path, tokenizer):
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "train.jsonl", documents(20))
    write_jsonl(tmp_path / "text" / "val.jsonl", ["seen nowhere else"])
    prepare([tmp_path / "text"], tmp_path / "bins", tokenizer)
    train, val = open_token_bins(tmp_path / "bins")
    assert without_end(decoded(val, tokenizer)) == ["seen nowhere else"]
    assert train.num_documents == 20


def test_where_no_document_is_picked_the_last_one_validates(tmp_path, tokenizer):
    texts = documents(30)
    texts[-1] = "a short last document"
    meta = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "bins", tokenizer, val_share=1e-9)
    train, val = open_token_bins(tmp_path / "bins")
    assert without_end(decoded(val, tokenizer)) == texts[-1:]
    assert without_end(decoded(train, tokenizer)) == texts[:-1]
    assert (meta.train.num_documents, meta.val.num_documents) == (29, 1)


def test_a_single_document_is_cut_for_validation(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("\n".join(documents(200)))
    meta = prepare([tmp_path / "book.txt"], tmp_path / "bins", tokenizer)
    train, val = open_token_bins(tmp_path / "bins")
    tokens = np.concatenate([train.read(0, train.num_tokens), val.read(0, val.num_tokens)])
    assert tokenizer.backend.decode(tokens[:-1].tolist()) == (tmp_path / "book.txt").read_text()
    assert tokens[-1] == tokenizer.eos_token_id
    assert 0.009 < val.num_tokens / len(tokens) < 0.011
    assert (meta.train.num_documents, meta.val.num_documents) == (1, 1)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', '{"text": "a"}\n'])
def test_text_that_is_empty_or_nearly_so_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="empty or nearly so"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "bins", tokenizer)
    assert names_in(tmp_path) == ["a.jsonl"]


def test_an_output_that_holds_something_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents())
    output = tmp_path / "bins"
    output.mkdir()
    prepare([path], output, tokenizer)  # empty is fine
    with pytest.raises(DataError, match="--output"):
        prepare([path], output, tokenizer)


def test_a_failure_midway_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_file, "BATCH_PIECES", 10)
    path = write_jsonl(tmp_path / "a.jsonl", documents())
    with open(path, "a") as file:
        file.write("{cut\n")
    progressed = []
    with pytest.raises(DataError, match="line 121"):
        prepare([path], tmp_path / "bins", tokenizer, progress=progressed.append)
    assert len(progressed) == 12  # it had written
    assert names_in(tmp_path) == ["a.jsonl"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from hypershard.data import prepare as p
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.tokenizer import load_tokenizer
write = p.write_json
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
p.write_json = die  # everything is on the disk but meta.json
p.prepare([Path(sys.argv[1])], Path(sys.argv[2]), load_tokenizer(TOKENIZER_PATH))
"""


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path, tokenizer):
    path, output = write_jsonl(tmp_path / "a.jsonl", documents()), tmp_path / "bins"
    done = subprocess.run([sys.executable, "-c", _KILLED, path, output], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    leftovers = [name for name in names_in(tmp_path) if name.endswith(".tmp")]
    assert len(leftovers) == 1 and not (tmp_path / leftovers[0] / "meta.json").exists()
    prepare([path], output, tokenizer)
    assert names_in(tmp_path) == ["a.jsonl", "bins"]
    open_token_bins(output)


def test_the_unfinished_folder_of_a_running_process_is_left_alone(tmp_path, tokenizer):
    other = tmp_path / f".bins.{process_space()}.{os.getppid()}.tmp"
    other.mkdir()
    prepare([write_jsonl(tmp_path / "a.jsonl", documents())], tmp_path / "bins", tokenizer)
    assert other.is_dir()


def test_a_file_the_system_refuses_to_grow_is_one_storage_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents() * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match="writing token bins into"):
            prepare([path], tmp_path / "bins", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ["a.jsonl"]


def test_a_full_disk_is_one_storage_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents() * 20)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(StorageError, match="no space left on the disk"):
            prepare([path], disk / "bins", tokenizer)
        assert names_in(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_progress_reaches_the_end(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", documents()) for i in range(2)]
    seen = []
    meta = prepare(paths, tmp_path / "bins", tokenizer, progress=seen.append)
    assert [one.read_bytes for one in seen] == sorted(one.read_bytes for one in seen)
    assert seen[-1].read_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in paths)
    assert seen[-1].num_tokens == meta.train.num_tokens + meta.val.num_tokens


@pytest.mark.parametrize("val_share", [0, 1, -0.1])
def test_shares_outside_0_to_1_are_refused(tmp_path, tokenizer, val_share):
    with pytest.raises(DataError, match="--val_share"):
        prepare([tmp_path], tmp_path / "bins", tokenizer, val_share=val_share)
