from __future__ import annotations

import json
import shutil

import pytest
from chat_shapes import save_tokenizer
from tokenizers import Tokenizer, models

from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.errors import DataError


def save(folder, vocab, config=None):
    folder.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab)))).save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_and_its_file_mean_the_same(tmp_path):
    shutil.copy(TOKENIZER_PATH, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(tmp_path / "tokenizer.json").sha256


def test_text_survives_and_nothing_is_added(tokenizer):
    text = "def naïve(): return '☃'\n"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.backend.decode(ids.tolist()) == text
    assert tokenizer.eos_token_id not in ids


def test_the_name_of_the_end_token_in_a_text_does_not_end_it(tokenizer):
    (ids,) = tokenizer.encode(["before <|endoftext|> after"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.backend.decode(ids.tolist()) == "before <|endoftext|> after"


def test_truncation_saved_in_a_tokenizer_is_not_applied(tmp_path):
    backend = Tokenizer.from_file(str(TOKENIZER_PATH))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    long, short = load_tokenizer(tmp_path).encode(["one two three four five six seven eight nine ten", "a"])
    assert len(long) > 9 and len(short) == 1


@pytest.mark.parametrize(
    ("vocab", "config", "expected"),
    [
        ({"a": 0, "</s>": 2}, None, 2),
        ({"a": 0, "</s>": 2, "<|endoftext|>": 5}, None, 5),
        ({"a": 0, "</s>": 2, "<|eot_id|>": 7}, {"eos_token": "<|eot_id|>"}, 7),
        ({"a": 0, "</s>": 2, "stop": 3}, {"eos_token": {"content": "stop", "lstrip": False}}, 3),
        ({"a": 0, "</s>": 2}, {"eos_token_id": 0}, 0),
    ],
)
def test_the_end_token_is_found(tmp_path, vocab, config, expected):
    assert load_tokenizer(save(tmp_path / "t", vocab, config)).eos_token_id == expected


def test_the_vocabulary_counts_gaps(tmp_path):
    assert load_tokenizer(save(tmp_path / "t", {"a": 0, "</s>": 41})).vocab_size == 42


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(DataError, match="end-of-document token"):
        load_tokenizer(save(tmp_path / "no_end", {"a": 0}))
    with pytest.raises(DataError, match=r"names eos_token '<end>'"):
        load_tokenizer(save(tmp_path / "wrong_end", {"a": 0}, {"eos_token": "<end>"}))
    with pytest.raises(DataError, match=r"a folder without tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="nothing there"):
        load_tokenizer("meta-llama/Llama-3.1-8B")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")


def test_special_tokens_are_those_marked_so(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    assert {"<|im_end|>", "[INST]", "<|endoftext|>"} <= tokenizer.special_tokens
    assert "<think>" not in tokenizer.special_tokens and "the" not in tokenizer.special_tokens


def test_a_batch_gives_the_ids_that_encode_does(tokenizer):
    texts = ["one two", "", "☃ <|endoftext|>"]
    assert [one.ids for one in tokenizer.encode_batch(texts)] == [ids.tolist() for ids in tokenizer.encode(texts)]
