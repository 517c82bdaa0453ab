"""What each name of --dataset means."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_texts import documents, write_jsonl
from prepared import prepared
from tokenizers import Tokenizer, models, pre_tokenizers

from hypershard.config.schema import DataConfig
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.open import Text, open_dataset
from hypershard.data.rows import Packs
from hypershard.data.sequences import training_sources, validation_sources
from hypershard.data.source import TokenSource
from hypershard.data.stream import StreamSpec
from hypershard.errors import ConfigError, DataError

CONVERSATION = {"messages": [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "A goose."}]}


def tokens_of(data: DataConfig) -> tuple[TokenSource, TokenSource]:
    """The train and val tokens of a data set of one member that is not streamed."""
    (member,) = open_dataset(data).members
    assert not isinstance(member.train, Text)
    return member.train, member.val


def test_every_format_opens(data_config: DataConfig) -> None:
    dataset = open_dataset(data_config)
    train, val = tokens_of(data_config)
    assert dataset.vocab_size == train.vocab_size == val.vocab_size == 4096
    assert dataset.eos_token_id == 0
    assert dataset.tokenizer_path is not None and dataset.tokenizer_path.is_file()
    assert train.num_tokens > 10 * val.num_tokens > 10
    assert dataset.fingerprint != dataset.val_fingerprint
    again = open_dataset(data_config)
    assert (again.fingerprint, again.val_fingerprint) == (dataset.fingerprint, dataset.val_fingerprint)


@pytest.mark.parametrize("name", ["missing.jsonl", "/nowhere/at/all", "./here"])
def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"--dataset={name}.*found nothing there"):
        open_dataset(DataConfig(dataset=name, cache_dir=str(tmp_path)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.csv.*expected.*\.parquet"):
        open_dataset(DataConfig(dataset=str(tmp_path / "a.csv"), cache_dir=str(tmp_path)))


def words_tokenizer(folder: Path) -> Path:
    """Another tokenizer: one id per word, ids above 65535."""
    folder.mkdir(exist_ok=True)
    words = sorted({word for text in documents() for word in text.split()})
    backend = Tokenizer(
        models.WordLevel({"</s>": 2} | {word: 70_000 + i for i, word in enumerate(words)}, unk_token="</s>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_the_tokenizer_given_is_used_and_its_vocabulary_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents())
    tokenizer = words_tokenizer(tmp_path / "words")
    data = DataConfig(dataset=str(tmp_path / "a.jsonl"), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(data)
    assert dataset.vocab_size > 70_000 and dataset.eos_token_id == 2
    assert tokens_of(data)[0].read(0, 100).max() >= 70_000  # stored in 32 bits
    assert dataset.tokenizer_path is not None
    assert dataset.tokenizer_path.read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_the_tokenizer_in_the_folder_is_the_default(tmp_path: Path) -> None:
    folder = words_tokenizer(tmp_path / "text")
    write_jsonl(folder / "a.jsonl", documents())
    assert open_dataset(DataConfig(dataset=str(folder), cache_dir=str(tmp_path / "cache"))).eos_token_id == 2


def test_token_bins_refuse_another_tokenizer_and_streaming(tmp_path: Path) -> None:
    prepared(write_jsonl(tmp_path / "a.jsonl", documents()), tmp_path / "bins")
    same = tmp_path / "same.json"
    shutil.copy(TOKENIZER_PATH, same)
    bins = str(tmp_path / "bins")
    open_dataset(DataConfig(dataset=bins, tokenizer=str(same)))
    with pytest.raises(DataError, match="tokenised with another tokenizer"):
        open_dataset(DataConfig(dataset=bins, tokenizer=str(words_tokenizer(tmp_path / "words"))))
    for setting in ({"streaming": True}, {"text_field": "content"}, {"malformed_rows": "skip"}, {"data_kind": "chat"}):
        with pytest.raises(DataError, match=rf"--{next(iter(setting))}=.*holds tokens already"):
            open_dataset(DataConfig(dataset=bins, **setting))  # type: ignore[arg-type]


# --- conversations


@pytest.fixture
def chat(tmp_path: Path) -> DataConfig:
    path, template = tmp_path / "chat.jsonl", tmp_path / "template.jinja"
    path.write_text("".join(json.dumps(CONVERSATION) + "\n" for _ in range(40)))
    template.write_text(
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return DataConfig(dataset=str(path), chat_template=str(template), cache_dir=str(tmp_path / "cache"))


def test_conversations_are_seen_by_their_first_row_and_packed_whole(chat: DataConfig) -> None:
    dataset = open_dataset(chat)
    assert dataset.members[0].kind == "chat"
    (source,) = training_sources(dataset, chat, context_tokens=64)
    assert isinstance(source.rows, Packs)
    row = source.rows.row(0)
    assert 0 < row.targets.sum() < len(row.targets) / 2  # the answers alone
    val, _ = validation_sources(dataset, chat, [source], context_tokens=64)
    assert val[0].row(0).targets.any()


def test_conversations_are_not_streamed_and_not_cut_by_windows(chat: DataConfig) -> None:
    with pytest.raises(DataError, match="--streaming=1"):
        open_dataset(DataConfig(**(vars(chat) | {"streaming": True})))
    cut = DataConfig(**(vars(chat) | {"packing": "concat", "long_documents": "drop"}))
    with pytest.raises(ConfigError, match=r"--long_documents=drop.*--packing=best_fit"):
        training_sources(open_dataset(cut), cut, context_tokens=64)


def test_a_text_field_is_refused_unless_something_read_is_text(chat: DataConfig, tmp_path: Path) -> None:
    texts = tmp_path / "text.jsonl"
    texts.write_text("".join(json.dumps({"content": text}) + "\n" for text in documents(60)))
    given = vars(chat) | {"text_field": "content"}
    for kind in ("auto", "chat"):
        with pytest.raises(DataError, match=r"--text_field=content.*conversations.*--messages_field=messages.*drop"):
            open_dataset(DataConfig(**(given | {"data_kind": kind})))
    # Of a mixture, the member that is text needs it. A template of one's own would be refused beside text.
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(TOKENIZER_PATH, tmp_path / "tokenizer" / "tokenizer.json")
    shutil.copy(str(chat.chat_template), tmp_path / "tokenizer" / "chat_template.jinja")
    mixture = {
        "dataset": f"{chat.dataset}:1,{texts}:1",
        "chat_template": None,
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    members = open_dataset(DataConfig(**(given | mixture))).members
    assert [member.kind for member in members] == ["chat", "text"]


# --- streams and mixtures


def test_a_stream_holds_out_validation_documents_once_for_all(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        texts = [f"{number} {place} {text}" for place, text in enumerate(documents(300))]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    data = DataConfig(dataset=str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(data)
    member = dataset.members[0]
    assert isinstance(member.train, Text) and member.train.held_share == 0.01
    assert member.val.num_tokens > 50
    (kept,) = (tmp_path / "cache").glob("val-*.npz")
    before = kept.stat().st_mtime_ns
    again = open_dataset(data).members[0].val
    assert kept.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.read(0, 50), member.val.read(0, 50))
    (source,) = training_sources(dataset, data, context_tokens=16)
    assert isinstance(source.rows, StreamSpec) and source.rows.val_share == 0.01
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "another"}).encode()))
    assert open_dataset(data).fingerprint != dataset.fingerprint


def test_a_stream_with_validation_files_validates_on_those(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", documents(50))
    write_jsonl(folder / "validation-0.jsonl", ["only this"])
    data = DataConfig(dataset=str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(data)
    (source,) = training_sources(dataset, data, context_tokens=16)
    assert isinstance(source.rows, StreamSpec) and source.rows.val_share == 0
    assert [file.name for file in source.rows.files] == ["train-0.jsonl"]
    assert dataset.members[0].val.num_tokens < 6


def test_members_of_a_mixture_need_one_tokenizer_and_streams_need_weights(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(60))
    prepared(tmp_path / "a.jsonl", tmp_path / "bins")
    words = words_tokenizer(tmp_path / "words")
    write_jsonl(words / "b.jsonl", documents(60))
    cache = str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"expected one tokenizer for all.*--tokenizer"):
        open_dataset(DataConfig(dataset=f"{tmp_path / 'bins'},{words}", cache_dir=cache))
    data = DataConfig(dataset=f"{tmp_path / 'bins'}:2,{tmp_path / 'a.jsonl'}:1", cache_dir=cache)
    sources = training_sources(open_dataset(data), data, context_tokens=16)
    assert [source.weight for source in sources] == [2, 1]
    by_size = DataConfig(dataset=f"{tmp_path / 'bins'},{tmp_path / 'a.jsonl'}", cache_dir=cache)
    sources = training_sources(open_dataset(by_size), by_size, context_tokens=16)
    sizes = [source.rows.num_samples for source in sources]  # type: ignore[union-attr]
    assert float(sources[0].weight / sources[1].weight) == pytest.approx(sizes[0] / sizes[1], rel=0.01)
