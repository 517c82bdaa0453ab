"""Each rank's share of every batch, and validation; what samples they are is test_feed.py's."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data_texts import write_jsonl
from numpy.typing import NDArray
from prepared import prepared
from test_rows import Tokens

from hypershard.config.schema import DataConfig
from hypershard.data.feed import Feed, Source
from hypershard.data.loader import Loader, Share, validation_batches
from hypershard.data.mixture import Mixture
from hypershard.data.open import open_dataset
from hypershard.data.packing import IGNORED_LABEL, Batch
from hypershard.data.rows import Rows, Windows
from hypershard.data.sequences import training_sources, validation_sources
from hypershard.errors import DataError

CONTEXT = 16


def places_source(num_tokens: int) -> Rows:
    """Tokens that are their own places, so a batch tells which sample it is."""
    return Windows(Tokens(list(range(num_tokens))), context_tokens=CONTEXT, document_mask=False)


def loader_of(
    rows: Rows, *, rank: int = 0, world_size: int = 1, batch_size: int = 2, prefetch_steps: int = 0, seed: int = 7
) -> Loader:
    feed = Feed([Source(name="a", weight=Fraction(1), rows=rows)], seed=seed, num_lanes=1, num_workers=0, rank=rank)
    share = Share(rank=rank, world_size=world_size, batch_size=batch_size)
    return Loader(feed, share, context_tokens=CONTEXT, prefetch_steps=prefetch_steps, pin=False)


def test_an_epoch_reads_each_sample_once() -> None:
    rows = places_source(24 * CONTEXT + 1)
    loaders = [loader_of(rows, rank=rank, world_size=2) for rank in range(2)]
    assert rows.num_samples == 24
    for epoch in range(2):
        firsts = [
            int(row[0]) // CONTEXT
            for position in range(epoch * 24, epoch * 24 + 24, 8)
            for loader in loaders
            for batch in loader.step(position, accumulation=2)
            for row in batch.input_ids
        ]
        assert sorted(firsts) == list(range(24))


def test_each_micro_batch_sits_where_the_formula_says() -> None:
    rows = places_source(1000 * CONTEXT + 1)
    whole = loader_of(rows, batch_size=24).step(48, accumulation=1)[0].input_ids
    for rank in range(3):
        for m, batch in enumerate(loader_of(rows, rank=rank, world_size=3).step(48, accumulation=4)):
            first = (m * 3 + rank) * 2
            assert torch.equal(batch.input_ids, whole[first : first + 2])


@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_what_is_made_ahead_is_what_would_be_made_now(prefetch_steps: int) -> None:
    rows = places_source(1000 * CONTEXT + 1)
    ahead, now = loader_of(rows, prefetch_steps=prefetch_steps), loader_of(rows)
    for position in (0, 4, 8, 200, 204, 8):  # jumps too: a restored run begins where it stood
        pairs = zip(ahead.step(position, accumulation=2), now.step(position, accumulation=2), strict=True)
        assert all(torch.equal(one.input_ids, other.input_ids) for one, other in pairs)
    ahead.close()


class Breaks:
    """Rows whose sixth is damaged."""

    num_samples = 1000

    def __init__(self) -> None:
        self.num_read = 0

    def row(self, index: int) -> object:
        self.num_read += 1
        if self.num_read == 6:
            raise DataError("row 6 is damaged")
        return places_source(100 * CONTEXT).row(0)

    def documents(self, index: int) -> list[str]:
        return []


def test_an_error_made_ahead_is_raised_at_the_step_that_needs_the_row() -> None:
    loader = loader_of(Breaks(), prefetch_steps=3)  # type: ignore[arg-type]
    for position in (0, 2):
        loader.step(position, accumulation=1)
    for _ in range(2):
        with pytest.raises(DataError, match="row 6"):
            loader.step(4, accumulation=1)
    loader.close()


# --- every format


@pytest.fixture(scope="module")
def sources(data_config: DataConfig) -> Iterator[tuple[list[Source], list[Rows], NDArray[np.int64]]]:
    dataset = open_dataset(data_config)
    train = training_sources(dataset, data_config, context_tokens=CONTEXT)
    val, _ = validation_sources(dataset, data_config, train, context_tokens=CONTEXT)
    source = dataset.members[0].val
    yield train, val, source.read(0, min(source.num_tokens, 4 * CONTEXT + 1))


def test_seeds_give_different_batches(sources: tuple[list[Source], list[Rows], object]) -> None:
    rows = sources[0][0].rows
    first, second = (loader_of(rows, seed=seed).step(0, accumulation=4) for seed in (1, 2))  # type: ignore[arg-type]
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))


def test_labels_are_the_next_tokens_of_the_file(
    sources: tuple[list[Source], list[Rows], NDArray[np.int64]],
) -> None:
    tokens = torch.from_numpy(sources[2])
    batch = next(validate(sources[1], batch_size=4, num_batches=1))
    labels, inputs = batch.labels.flatten(), batch.input_ids.flatten()
    places = (labels != IGNORED_LABEL).nonzero().flatten()
    assert len(places) > 0
    assert torch.equal(labels[places], tokens[places + 1])
    assert not (inputs[places] == 0).any()  # 0 ends documents


# --- validation


def validate(
    rows: list[Rows], *, rank: int = 0, world_size: int = 1, batch_size: int = 2, num_batches: int
) -> Iterator[Batch]:
    share = Share(rank=rank, world_size=world_size, batch_size=batch_size)
    mixture = Mixture([Fraction(1)] * len(rows))
    return validation_batches(rows, mixture, share, context_tokens=CONTEXT, num_batches=num_batches)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_each_token_once_over_all_ranks(world_size: int) -> None:
    num_tokens = 9 * CONTEXT + 6  # nine sequences, and five labels that do not fill one
    targets = []
    for rank in range(world_size):
        batches = list(validate([places_source(num_tokens)], rank=rank, world_size=world_size, num_batches=7))
        assert len(batches) == 7
        assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, CONTEXT)}
        targets += [label for batch in batches for label in batch.labels.flatten().tolist() if label != IGNORED_LABEL]
    assert sorted(targets) == list(range(1, num_tokens))


def test_validation_takes_sources_in_turn_and_stops_at_the_batches_asked_for() -> None:
    rows = [places_source(1000 * CONTEXT + 1), places_source(3 * CONTEXT + 1)]
    batches = list(validate(rows, batch_size=4, num_batches=3))
    firsts = [[int(row[0]) // CONTEXT for row in batch.input_ids] for batch in batches]
    assert [sorted(some) for some in firsts] == [[0, 0, 1, 1], [0, 2, 2, 3], [0, 0, 4, 5]]  # 0: also where one ran out
    assert [batch.num_valid_tokens for batch in batches] == [4 * CONTEXT, 3 * CONTEXT, 2 * CONTEXT]


def test_a_validation_split_shorter_than_a_sequence_still_validates() -> None:
    batches = list(validate([places_source(5)], num_batches=2))
    assert [batch.num_valid_tokens for batch in batches] == [4, 0]


# --- what is refused


def test_a_train_split_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    prepared(write_jsonl(tmp_path / "a.jsonl", ["one two three"] * 3), tmp_path / "bins")
    data = DataConfig(dataset=str(tmp_path / "bins"))
    with pytest.raises(DataError, match=r"found \d+ tokens to train on.*at least 4097.*--max_context_width"):
        training_sources(open_dataset(data), data, context_tokens=4096)
