from __future__ import annotations

import shutil

import pytest
from data_texts import documents, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from hypershard.config.schema import DataConfig
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.open import open_dataset
from hypershard.data.prepare import prepare
from hypershard.errors import DataError


def test_every_format_opens(data_config):
    dataset = open_dataset(data_config)
    assert dataset.vocab_size == dataset.train.vocab_size == dataset.val.vocab_size == 4096
    assert dataset.eos_token_id == 0
    assert dataset.tokenizer_path.is_file()
    assert dataset.train.num_tokens > 10 * dataset.val.num_tokens > 10
    assert dataset.train.fingerprint != dataset.val.fingerprint
    again = open_dataset(data_config)
    assert (again.folder, again.train.fingerprint) == (dataset.folder, dataset.train.fingerprint)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("s3://bucket/data", "s3:// URI"),
        ("allenai/c4", "names of hub data sets are not understood"),
        ("missing.jsonl", "nothing there"),
        ("/nowhere/at/all", "nothing there"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=found) as refused:
        open_dataset(DataConfig(dataset=name, cache_dir=str(tmp_path)))
    assert "--dataset takes: 'embedded'" in str(refused.value) and "token bins" in str(refused.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"found a \.parquet file; --dataset takes"):
        open_dataset(DataConfig(dataset=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path)))


def test_bins_without_meta_are_refused_as_bins(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"found no meta\.json.*hypershard prepare"):
        open_dataset(DataConfig(dataset=str(tmp_path), cache_dir=str(tmp_path)))


def words_tokenizer(folder):
    """Another tokenizer: one id per word, ids above 65535."""
    folder.mkdir(exist_ok=True)
    words = sorted({word for text in documents() for word in text.split()})
    backend = Tokenizer(
        models.WordLevel({"</s>": 2} | {word: 70_000 + i for i, word in enumerate(words)}, unk_token="</s>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_the_tokenizer_given_is_used_and_its_vocabulary_reported(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents())
    tokenizer = words_tokenizer(tmp_path / "words")
    dataset = open_dataset(
        DataConfig(dataset=str(tmp_path / "a.jsonl"), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache"))
    )
    assert dataset.vocab_size > 70_000 and dataset.eos_token_id == 2
    tokens = dataset.train.read(0, 100)  # stored in 32 bits
    assert tokens.max() >= 70_000
    assert dataset.tokenizer_path.read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_the_tokenizer_in_the_folder_is_the_default(tmp_path):
    folder = words_tokenizer(tmp_path / "text")
    write_jsonl(folder / "a.jsonl", documents())
    assert open_dataset(DataConfig(dataset=str(folder), cache_dir=str(tmp_path / "cache"))).eos_token_id == 2


def test_token_bins_refuse_another_tokenizer(tmp_path, tokenizer):
    prepare([write_jsonl(tmp_path / "a.jsonl", documents())], tmp_path / "bins", tokenizer)
    same = tmp_path / "same.json"
    shutil.copy(TOKENIZER_PATH, same)
    open_dataset(DataConfig(dataset=str(tmp_path / "bins"), tokenizer=str(same)))
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        open_dataset(DataConfig(dataset=str(tmp_path / "bins"), tokenizer=str(words_tokenizer(tmp_path / "words"))))
