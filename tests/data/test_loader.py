"""The contract every format keeps: same data for any world size, resumable at any step, no sample twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_texts import write_jsonl

from hypershard.data.loader import Loader
from hypershard.data.open import open_dataset
from hypershard.data.packing import IGNORED_LABEL
from hypershard.data.prepare import prepare
from hypershard.data.token_bins import open_token_bins
from hypershard.errors import DataError

CONTEXT = 16


@pytest.fixture
def dataset(data_config):
    return open_dataset(data_config)


def make_loader(source, *, rank=0, world_size=1, batch_size=2, seed=7, context_tokens=CONTEXT, document_mask=True):
    return Loader(
        source,
        context_tokens=context_tokens,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        document_mask=document_mask,
    )


def rows_of_step(source, first_position, *, world_size, accumulation, batch_size=2):
    """The global batch in the order of its positions: rows of (input ids, labels, positions)."""
    steps = [
        make_loader(source, rank=rank, world_size=world_size, batch_size=batch_size).step(
            first_position, accumulation=accumulation
        )
        for rank in range(world_size)
    ]
    batches = [steps[rank][m] for m in range(accumulation) for rank in range(world_size)]
    return torch.cat([torch.stack([b.input_ids, b.labels, b.position_ids], dim=1) for b in batches])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_the_world_size(dataset, world_size, accumulation):
    for first_position in (0, 8, 800):
        expected = rows_of_step(dataset.train, first_position, world_size=1, accumulation=1, batch_size=8)
        found = rows_of_step(dataset.train, first_position, world_size=world_size, accumulation=accumulation)
        assert torch.equal(found, expected)


def test_resuming_gives_the_steps_of_an_uninterrupted_run(dataset):
    uninterrupted = make_loader(dataset.train, rank=1, world_size=2)
    samples_per_step = 2 * 2 * 3
    steps = [uninterrupted.step(k * samples_per_step, accumulation=3) for k in range(6)]
    for k in (5, 2):
        resumed = make_loader(dataset.train, rank=1, world_size=2).step(k * samples_per_step, accumulation=3)
        for found, expected in zip(resumed, steps[k], strict=True):
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.labels, expected.labels)


class Recorder:
    """A source whose tokens are their own places, so a batch tells which sample it is."""

    eos_token_id = None
    tokenizer_path = None
    fingerprint = "places"

    def __init__(self, num_tokens):
        self.num_tokens = self.vocab_size = num_tokens

    def read(self, start, count):
        assert start + count <= self.num_tokens
        return np.arange(start, start + count)


def test_an_epoch_reads_each_sample_once():
    source = Recorder(24 * CONTEXT + 1)
    loaders = [make_loader(source, rank=rank, world_size=2, document_mask=False) for rank in range(2)]
    assert loaders[0].samples_per_epoch == 24
    for epoch in range(2):
        firsts = [
            int(row[0]) // CONTEXT
            for position in range(epoch * 24, epoch * 24 + 24, 8)
            for loader in loaders
            for batch in loader.step(position, accumulation=2)
            for row in batch.input_ids
        ]
        assert sorted(firsts) == list(range(24))


def test_each_micro_batch_sits_where_the_formula_says():
    source = Recorder(1000 * CONTEXT + 1)
    whole = make_loader(source, batch_size=24, document_mask=False).step(48, accumulation=1)[0].input_ids
    for rank in range(3):
        step = make_loader(source, rank=rank, world_size=3, document_mask=False).step(48, accumulation=4)
        for m, batch in enumerate(step):
            first = (m * 3 + rank) * 2
            assert torch.equal(batch.input_ids, whole[first : first + 2])


def test_labels_are_the_next_tokens_of_the_file(dataset):
    loader = make_loader(dataset.val, batch_size=4)
    tokens = torch.from_numpy(dataset.val.read(0, min(dataset.val.num_tokens, 4 * CONTEXT + 1)))
    batch = next(loader.validation(1))
    labels, inputs = batch.labels.flatten(), batch.input_ids.flatten()
    places = (labels != IGNORED_LABEL).nonzero().flatten()
    assert len(places) > 0
    assert torch.equal(labels[places], tokens[places + 1])
    assert not (inputs[places] == dataset.eos_token_id).any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_each_token_once_over_all_ranks(world_size):
    source = Recorder(9 * CONTEXT + 6)  # nine sequences, and five labels that do not fill one
    targets = []
    for rank in range(world_size):
        batches = list(make_loader(source, rank=rank, world_size=world_size, document_mask=False).validation(7))
        assert len(batches) == 7
        assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, CONTEXT)}
        targets += [label for batch in batches for label in batch.labels.flatten().tolist() if label != IGNORED_LABEL]
    assert sorted(targets) == list(range(1, source.num_tokens))


def test_validation_stops_at_the_batches_asked_for():
    source = Recorder(1000 * CONTEXT + 1)
    batches = list(make_loader(source, rank=1, world_size=2, document_mask=False).validation(3))
    assert [int(batch.input_ids[0, 0]) // CONTEXT for batch in batches] == [2, 6, 10]
    assert all(batch.num_valid_tokens == 2 * CONTEXT for batch in batches)


def test_a_validation_split_shorter_than_a_sequence_still_validates():
    batches = list(make_loader(Recorder(5), document_mask=False).validation(2))
    assert [batch.num_valid_tokens for batch in batches] == [4, 0]


def test_a_train_split_shorter_than_a_sequence_is_refused(tmp_path, tokenizer):
    prepare([write_jsonl(tmp_path / "a.jsonl", ["one two three"] * 3)], tmp_path / "bins", tokenizer)
    train, _ = open_token_bins(tmp_path / "bins")
    loader = make_loader(train, context_tokens=4096)
    assert loader.num_samples == 0
    for use in (lambda: loader.samples_per_epoch, lambda: loader.step(0, accumulation=1)):
        with pytest.raises(DataError, match=rf"found {train.num_tokens} tokens.*at least 4097.*--max_context_width"):
            use()


def test_document_mask_needs_to_know_where_documents_end():
    with pytest.raises(DataError, match="--document_mask"):
        make_loader(Recorder(100))


def test_seeds_give_different_batches(dataset):
    first, second = (make_loader(dataset.train, seed=seed).step(0, accumulation=4) for seed in (1, 2))
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
