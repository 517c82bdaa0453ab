"""Pairs of answers from their files to batches: none divided, lost or repeated; and what does not go with them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from chat_shapes import CHATML, assistant, line, save_tokenizer, user
from data_texts import WORDS, documents, write_jsonl
from prepared import contents, prepared, spec_of
from test_preference import halves, pair_spec
from test_token_bins import change_meta

from hypershard.config.schema import DataConfig
from hypershard.data.analysis.analyze import analyze_dataset
from hypershard.data.bins.meta import read_meta
from hypershard.data.bins.token_bins import open_token_bins
from hypershard.data.feed import Feed
from hypershard.data.loader import Loader, Share
from hypershard.data.open import open_dataset
from hypershard.data.packing import IGNORED_LABEL, Batch, batch_of
from hypershard.data.records import Encoded
from hypershard.data.rows import EMPTY
from hypershard.data.sequences import packing_of, training_sources, validation_sources
from hypershard.errors import ConfigError, DataError

CONTEXT = 64


def rows_of(num_pairs: int = 150) -> list[dict[str, object]]:
    """Pairs of 10 to 180 tokens, texts and conversations in turn."""
    chosen, rejected = documents(2 * num_pairs)[:num_pairs], documents(2 * num_pairs)[num_pairs:]
    rows: list[dict[str, object]] = []
    for number, texts in enumerate(zip(chosen, rejected, strict=True)):
        good, bad = (" ".join(text.split()[: 3 + number % 40]) for text in texts)
        asked = f"{number}: {WORDS[number % len(WORDS)]}"
        if number % 2:
            rows.append({"prompt": asked, "chosen": f" {good}", "rejected": f" {bad}"})
        else:
            rows.append({"prompt": [user(asked)], "chosen": [assistant(good)], "rejected": [assistant(bad)]})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> DataConfig:
    path = write_rows(tmp_path / "pairs.jsonl", rows_of())
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    return DataConfig(dataset=str(path), tokenizer=str(tokenizer), cache_dir=str(tmp_path / "cache"))


def changed(data: DataConfig, **changes: object) -> DataConfig:
    return DataConfig(**(vars(data) | changes))


Sequence = tuple[tuple[int, ...], tuple[bool, ...]]  # tokens, and which are counted


def up_to_end(tokens: list[int], counted: list[bool]) -> Sequence:
    """Without what a template writes behind the last token that counts: a full row does not show it."""
    end = len(counted) - counted[::-1].index(True) if any(counted) else len(counted)
    return tuple(tokens[:end]), tuple(counted[:end])


def pairs_in(batch: Batch) -> list[tuple[Sequence, Sequence]]:
    """As whoever has a batch finds them: sequences begin at position 0; of an odd number the last is padding."""
    found = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        borders = [*np.flatnonzero(positions.numpy() == 0).tolist(), len(ids)]
        sequences = []
        for begin, end in itertools.pairwise(borders):
            tokens, next_tokens = ids[begin:end].tolist(), labels[begin:end].tolist()
            counted = [False, *(label != IGNORED_LABEL for label in next_tokens)]
            if counted[-1]:  # the last token of a full row is a label only
                tokens.append(next_tokens[-1])
            assert all(label in (IGNORED_LABEL, token) for label, token in zip(next_tokens, tokens[1:], strict=False))
            sequences.append(up_to_end(tokens, counted[: len(tokens)]))
        if len(sequences) % 2:
            assert not any(sequences.pop()[1])
        found += list(zip(sequences[::2], sequences[1::2], strict=True))
    return found


def encoded_pairs(folder: Path) -> list[list[Encoded]]:
    """Every pair of the file as its encoder makes it."""
    return [halves(one) for one in pair_spec(folder, CHATML).build().encode([line(row) for row in rows_of()])]


def loader_of(data: DataConfig, *, rank: int = 0, world_size: int = 1, batch_size: int = 1) -> Loader:
    sources = training_sources(open_dataset(data), data, context_tokens=CONTEXT)
    feed = Feed(sources, seed=3, num_lanes=1, num_workers=0, rank=rank)
    share = Share(rank=rank, world_size=world_size, batch_size=batch_size)
    return Loader(feed, share, context_tokens=CONTEXT, prefetch_steps=0, pin=False)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_an_epoch_holds_each_pair_once_and_whole(
    pairs: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, packing: str
) -> None:
    pairs = changed(pairs, packing=packing)
    dataset = open_dataset(pairs)
    assert dataset.is_preference and dataset.members[0].kind == "preference"
    with caplog.at_level("INFO", logger="hypershard"):
        (source,) = training_sources(dataset, pairs, context_tokens=CONTEXT)
    val, _ = validation_sources(dataset, pairs, [source], context_tokens=CONTEXT)
    expected = [
        tuple(up_to_end(one.tokens.tolist(), one.targets.tolist()) for one in pair)
        for pair in encoded_pairs(tmp_path / "same")
        if sum(len(one.tokens) for one in pair) <= CONTEXT + 1
    ]
    assert 20 < len(expected) < 130  # some fit and some do not
    num_dropped = 150 - len(expected)
    loader, found = loader_of(pairs), []
    for position in range(source.rows.num_samples):
        (batch,) = loader.step(position, accumulation=1)
        found += pairs_in(batch)
        assert batch.num_valid_tokens == sum(sum(half[1]) for pair in pairs_in(batch) for half in pair)
    assert (source.rows.num_samples == len(found)) == (packing == "none")
    validating = pairs_in(batch_of([val[0].row(index) for index in range(val[0].num_samples)], context_tokens=CONTEXT))
    num_val_dropped = open_dataset(pairs).members[0].val.num_documents - len(validating)
    assert validating and sorted(found + validating) == sorted(expected)
    assert f"{num_dropped - num_val_dropped} pairs of answers dropped" in caplog.text
    assert pairs_in(batch_of([EMPTY], context_tokens=CONTEXT)) == []


def test_two_ranks_read_what_one_does(pairs: DataConfig) -> None:
    one, two = loader_of(pairs, batch_size=4), [loader_of(pairs, rank=rank, world_size=2) for rank in range(2)]
    for position in (0, 4, 8, 1000):
        alone = pairs_in(one.step(position, accumulation=1)[0])
        batches = [loader.step(position, accumulation=2) for loader in two]
        assert alone == [
            pair for micro_step in zip(*batches, strict=True) for one in micro_step for pair in pairs_in(one)
        ]
        assert alone


@pytest.mark.usefixtures("small_batches")
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    rows = [*rows_of(60), {"chosen": "a", "rejected": "a"}]
    path, spec = write_rows(tmp_path / "pairs.jsonl", rows), pair_spec(tmp_path / "tokenizer", CHATML)
    for number in (1, 2):
        meta = prepared(path, tmp_path / str(number), spec=spec, num_processes=number, malformed_rows="skip")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert (meta.kind, meta.num_malformed_rows) == ("preference", 1)
    train, val = open_token_bins(tmp_path / "1")
    assert train.num_documents + val.num_documents == 60 and val.num_documents > 1
    targets = np.fromfile(tmp_path / "1" / "train.targets", dtype="u1")
    assert (targets == 2).sum() == train.num_documents
    np.testing.assert_array_equal(train.targets(0, train.num_tokens), targets == 1)


def test_where_the_hash_picks_no_pair_the_last_one_validates_whole(tmp_path: Path) -> None:
    rows = [*rows_of(3)[:2], rows_of()[38]]  # the last one is most of the tokens
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    spec = pair_spec(tmp_path / "tokenizer", CHATML)
    meta = prepared(path, tmp_path / "bins", spec=spec, val_share=1e-9)
    assert (meta.train.num_documents, meta.val.num_documents) == (2, 1)
    _, val = open_token_bins(tmp_path / "bins")
    (last,) = spec.build().encode([line(rows[-1])])
    assert val.read(0, val.num_tokens).tolist() == last.tokens.tolist()
    assert val.second_start(0, val.num_tokens) == last.second_start and meta.train.num_tokens < val.num_tokens
    with pytest.raises(DataError, match=r"one pair of answers.*at least two"):
        prepared(write_rows(tmp_path / "one.jsonl", rows_of(1)), tmp_path / "one", spec=spec)


def test_pairs_too_long_for_the_context_name_what_to_raise(pairs: DataConfig) -> None:
    with pytest.raises(DataError, match=r"pairs of answers are longer.*--max_context_width=8 .*larger"):
        training_sources(open_dataset(pairs), pairs, context_tokens=8)


def test_nothing_left_to_validate_on_is_no_loss_of_zero(tmp_path: Path, pairs: DataConfig) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for name, lengths in (("train", range(10)), ("val", range(36, 40))):
        rows = [row for number, row in enumerate(rows_of()) if number % 40 in lengths]
        write_rows(folder / f"{name}.jsonl", rows)
    data = changed(pairs, dataset=str(folder))
    dataset = open_dataset(data)
    sources = training_sources(dataset, data, context_tokens=80)
    with pytest.raises(DataError, match=r"pairs of answers held out are longer .* larger --max_context_width, or"):
        validation_sources(dataset, data, sources, context_tokens=80)


@pytest.mark.parametrize(
    "setting",
    [{"packing": "concat"}, {"long_documents": "truncate"}, {"long_documents": "split"}, {"document_mask": 0}],
)
def test_what_would_divide_a_pair_is_refused(pairs: DataConfig, setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"--{name}=.*pairs of answers stay whole"):
        packing_of(changed(pairs, **setting), kind="preference", is_stream=False)


def test_what_does_not_go_with_pairs_is_refused(pairs: DataConfig, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "text.jsonl", documents(60))
    for dataset in (f"{pairs.dataset}:1,{texts}:1", f"{texts}:1,{pairs.dataset}:1"):
        with pytest.raises(DataError, match=r"of kind preference.*in all of them or in none"):
            open_dataset(changed(pairs, dataset=dataset))
    with pytest.raises(DataError, match="--streaming=1"):
        open_dataset(changed(pairs, streaming=True))
    with pytest.raises(DataError, match=r"--messages_field=turns.*read from prompt, chosen and rejected"):
        open_dataset(changed(pairs, messages_field="turns"))


def test_bins_say_what_they_are(pairs: DataConfig, tmp_path: Path) -> None:
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/meta.json")) if open_dataset(pairs) else ()
    bins = DataConfig(dataset=str(folder))
    assert open_dataset(bins).is_preference and open_dataset(bins).fingerprint == open_dataset(pairs).fingerprint
    text = tmp_path / "text"
    prepared(write_jsonl(tmp_path / "text.jsonl", documents(60)), text, spec=spec_of())
    assert read_meta(text).kind == "text" and not open_dataset(DataConfig(dataset=str(text))).is_preference
    before = open_dataset(bins).fingerprint
    change_meta(folder, kind="chat")
    assert open_token_bins(folder)[0].fingerprint != before
    with pytest.raises(DataError, match=r"holds 2 at token .*expected 0 or 1"):
        training_sources(open_dataset(bins), bins, context_tokens=CONTEXT)[0].rows.row(0)
    change_meta(folder, kind="text")
    with pytest.raises(DataError, match="kind 'text' and 2 files of targets"):
        open_dataset(bins)


def test_a_pair_without_its_mark_is_damage(pairs: DataConfig, tmp_path: Path) -> None:
    open_dataset(pairs)
    (path,) = (tmp_path / "cache").glob("*/train.targets")
    targets = np.fromfile(path, dtype="u1")
    targets[targets == 2] = 0
    targets.tofile(path)
    with pytest.raises(DataError, match=r"marks 0 places.*expected one, where its second answer begins"):
        training_sources(open_dataset(pairs), pairs, context_tokens=CONTEXT)[0].rows.row(0)


def test_an_analysis_counts_pairs_and_answers(pairs: DataConfig, tmp_path: Path) -> None:
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/meta.json")) if open_dataset(pairs) else ()
    expected = encoded_pairs(tmp_path / "same")
    lengths = [sum(len(half.tokens) for half in pair) for pair in expected]
    ((text, _),) = analyze_dataset(changed(pairs, malformed_rows="skip"), sample=None, num_processes=1)
    assert (text.kind, text.num_samples, text.is_fine_tuning) == ("preference", 150, True)
    assert (text.num_tokens, text.lengths.maximum) == (sum(lengths), max(lengths))
    assert text.num_target_tokens == sum(int(half.targets.sum()) for pair in expected for half in pair)
    ((bins, _),) = analyze_dataset(DataConfig(dataset=str(folder)), sample=None, num_processes=1)
    assert (bins.kind, bins.num_near_empty) == ("preference", 0)
    assert bins.num_target_tokens / bins.num_tokens == pytest.approx(text.num_target_tokens / text.num_tokens, rel=0.1)
