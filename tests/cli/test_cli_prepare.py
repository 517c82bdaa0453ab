from __future__ import annotations

import subprocess
import sys

import pytest

from hypershard.cli import prepare
from hypershard.config.schema import DataConfig
from hypershard.data.open import EMBEDDED_VAL_SHARE
from hypershard.data.prepare import SPLIT_SEED, VAL_SHARE
from hypershard.data.token_bins import open_token_bins
from hypershard.errors import DataError, StorageError


def words(*argv):
    return [str(word) for word in argv]


def test_makes_a_folder_and_says_how_to_use_it(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"content": "one two three four five six seven"}\n' * 50)
    output = tmp_path / "bins"
    assert (
        prepare.run(words(tmp_path / "a.jsonl", "--output", output, "--text_field", "content", "--val_share", 0.2)) == 0
    )
    train, val = open_token_bins(output)
    printed = capsys.readouterr().out
    assert f"{train.num_tokens:,} tokens" in printed and f"{val.num_documents:,} documents" in printed
    assert f"hypershard train --dataset {output}" in printed


def test_the_embedded_corpus_can_be_prepared(tmp_path):
    assert prepare.run(words("embedded", "--output", tmp_path / "bins")) == 0
    assert open_token_bins(tmp_path / "bins")[0].num_tokens > 500_000


def test_bad_input_and_output_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        prepare.run(words(tmp_path / "missing.txt", "--output", tmp_path / "bins"))
    with pytest.raises(StorageError, match="--output=s3://bucket"):
        prepare.run(words("embedded", "--output", "s3://bucket/bins"))


def test_help_teaches_without_torch_or_tokenizers():
    code = (
        "import sys; from hypershard.cli import prepare; print(prepare.build_parser().format_help());"
        "assert not {'torch', 'tokenizers', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for part in ("--text_field", "--val_share", "--tokenizer", "examples:", "hypershard train --dataset"):
        assert part in done.stdout


def test_the_defaults_shown_are_the_defaults_used():
    # --help must start fast, so the parser does not import the modules these live in.
    parser = prepare.build_parser()
    args = parser.parse_args(["a.txt", "--output", "bins"])
    assert (args.split_seed, args.text_field) == (SPLIT_SEED, DataConfig().text_field)
    assert f"(default: {VAL_SHARE}; embedded: {EMBEDDED_VAL_SHARE})" in " ".join(parser.format_help().split())
