"""The contract of everything that training reads: the same samples for any world size, number of workers and restarts.

One test for all kinds of sources and mixtures of them: windows of bins, packs, streams of few and of many files.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data_texts import documents
from test_rows import Tokens

from hypershard.data.encode.encoder import EncoderSpec, encoder_spec
from hypershard.data.encode.tokenizer import TextTokenizer
from hypershard.data.feed import Feed, Source, encoded_cursors, merged_cursors
from hypershard.data.loader import Loader, Share
from hypershard.data.order import SampleOrder
from hypershard.data.packing import Batch
from hypershard.data.packs import best_fit
from hypershard.data.read.documents import read_documents
from hypershard.data.records import WHOLE, DataFile
from hypershard.data.rows import Packs, Rows, Windows
from hypershard.data.stream import Cursor, Lane, StreamSpec, lane_parts, validates
from hypershard.data.workers import MAX_DEATHS
from hypershard.errors import CheckpointError, DataError

STREAMS = ("one", "packed", "txt", "table", "arrow", "many")
CONTEXT = 24
GLOBAL_BATCH = 8


def numbered_texts() -> list[str]:
    return [f"{number} {text} {number}" for number, text in enumerate(documents(160))]


def data_file(path: Path) -> DataFile:
    status = path.stat()
    return DataFile(location=str(path), size_bytes=status.st_size, version=str(status.st_mtime_ns), split=None)


def lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="session")
def encoder(tokenizer: TextTokenizer) -> EncoderSpec:
    return encoder_spec(
        kind="text", tokenizer=tokenizer, text_field="text", messages_field="messages", chat_template=None
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DataFile, ...]]:
    """The same documents in every kind of file: few, packed, of tables, and more files than a step has sequences."""
    folder, texts = tmp_path_factory.mktemp("stream"), numbered_texts()
    found: dict[str, list[DataFile]] = {kind: [] for kind in STREAMS}
    (folder / "one.jsonl").write_bytes(lines(texts))
    found["one"].append(data_file(folder / "one.jsonl"))
    for number in range(3):
        path = folder / f"packed-{number}.jsonl.gz"
        path.write_bytes(gzip.compress(lines(texts[number::3])))
        found["packed"].append(data_file(path))
    for number in range(20):
        path = folder / f"many-{number:02d}.jsonl"
        path.write_bytes(lines(texts[number::20]))
        found["many"].append(data_file(path))
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": texts, "id": range(len(texts))})
    pq.write_table(table, folder / "table.parquet", row_group_size=10)
    found["table"].append(data_file(folder / "table.parquet"))
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=13)
    found["arrow"].append(data_file(folder / "stream.arrow"))
    (folder / "text.txt.xz").write_bytes(lzma.compress("\n<|endoftext|>\n".join(texts).encode()))
    found["txt"].append(data_file(folder / "text.txt.xz"))
    return {name: tuple(some) for name, some in found.items()}


def spec_of(files: tuple[DataFile, ...], encoder: EncoderSpec, **changes: object) -> StreamSpec:
    settings = {
        "name": "stream",
        "files": files,
        "encoder": encoder,
        "seed": 3,
        "window": 7,
        "context_tokens": CONTEXT,
        "document_mask": True,
        "malformed_rows": "refuse",
        "val_share": 0.0,
    }
    return StreamSpec(**(settings | changes))  # type: ignore[arg-type]


def windows() -> Rows:
    return Windows(
        Tokens([n % 50 + 10 if n % 11 else 9 for n in range(3001)]), context_tokens=CONTEXT, document_mask=True
    )


def packs() -> Rows:
    chance = np.random.default_rng(4)
    starts = np.cumsum([0, *chance.integers(2, 40, size=150)])
    source = Tokens(list(range(int(starts[-1]))), starts=starts[:-1].tolist())
    plan = best_fit(starts[:-1], num_tokens=int(starts[-1]), context_tokens=CONTEXT, long_documents="split")
    return Packs(source, plan, document_mask=True)


KINDS = ("windows", "packs", *STREAMS, "mixture")


@pytest.fixture(params=KINDS)
def sources(
    request: pytest.FixtureRequest, files: dict[str, tuple[DataFile, ...]], encoder: EncoderSpec
) -> list[Source]:
    def source(name: str, weight: str = "1") -> Source:
        made = {"windows": windows, "packs": packs}.get(name)
        return Source(name=name, weight=Fraction(weight), rows=made() if made else spec_of(files[name], encoder))

    if request.param == "mixture":
        return [source("packed", "0.5"), source("windows", "0.3"), source("one", "0.15"), source("packs", "0.05")]
    return [source(request.param)]


def feed_of(sources: list[Source], *, num_workers: int = 0, rank: int = 0) -> Feed:
    return Feed(sources, seed=7, num_lanes=GLOBAL_BATCH, num_workers=num_workers, rank=rank)


class Run:
    """All ranks of a run, in one process."""

    def __init__(self, sources: list[Source], *, world_size: int, num_workers: int = 0, prefetch: int = 0):
        self.world_size = world_size
        self.accumulation = 2 if world_size <= 4 else 1
        self.batch_size = GLOBAL_BATCH // world_size // self.accumulation
        self.feeds = [feed_of(sources, num_workers=num_workers, rank=rank) for rank in range(world_size)]
        self.loaders = [
            Loader(
                feed,
                Share(rank=rank, world_size=world_size, batch_size=self.batch_size),
                context_tokens=CONTEXT,
                prefetch_steps=prefetch,
                pin=False,
            )
            for rank, feed in enumerate(self.feeds)
        ]

    def steps(self, first: int, count: int) -> list[torch.Tensor]:
        """Each step's global batch in the order of its positions: [G, 3, T] of ids, labels and positions."""
        found = []
        for step in range(first, first + count):
            of_ranks = [one.step(step * GLOBAL_BATCH, accumulation=self.accumulation) for one in self.loaders]
            batches = [of_ranks[rank][m] for m in range(self.accumulation) for rank in range(self.world_size)]
            found.append(torch.cat([as_rows(batch) for batch in batches]))
        return found

    def saved(self) -> tuple[int, str]:
        """What a checkpoint keeps, gathered from the ranks."""
        return self.feeds[0].num_lanes, encoded_cursors(merged_cursors([feed.cursors for feed in self.feeds]))

    def restore(self, saved: tuple[int, str]) -> None:
        for loader in self.loaders:
            loader.restore(saved[0], cursors=saved[1])

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def as_rows(batch: Batch) -> torch.Tensor:
    return torch.stack([batch.input_ids, batch.labels, batch.position_ids], dim=1)


@pytest.fixture
def run(sources: list[Source]) -> Iterator[Callable[..., Run]]:
    runs = []

    def start(**settings: int) -> Run:
        runs.append(Run(sources, **settings))
        return runs[-1]

    yield start
    for one in runs:
        one.close()


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_step_is_the_same_for_any_world_size(run: Callable[..., Run], world_size: int) -> None:
    assert equal(run(world_size=world_size, prefetch=2).steps(0, 12), run(world_size=1).steps(0, 12))


def test_resumed_once_or_five_times_at_other_world_sizes_nothing_changes(run: Callable[..., Run]) -> None:
    expected = run(world_size=1).steps(0, 24)
    found, saved = [], None
    for number, world_size in enumerate((1, 4, 2, 8, 1, 2)):
        part = run(world_size=world_size, prefetch=number % 3)
        if saved is not None:
            part.restore(saved)
        found += part.steps(len(found), 4)
        saved = part.saved()
    assert equal(found, expected)


def test_another_global_batch_goes_on_where_the_first_one_was(run: Callable[..., Run]) -> None:
    """As many samples a step as before is what lanes are made for; other numbers lose and repeat nothing either."""
    expected = torch.cat(run(world_size=1).steps(0, 9))
    first = run(world_size=2)
    found = first.steps(0, 3)
    second = run(world_size=2)
    second.batch_size *= 3
    for rank, feed in enumerate(second.feeds):
        share = Share(rank=rank, world_size=2, batch_size=6)
        second.loaders[rank] = Loader(feed, share, context_tokens=CONTEXT, prefetch_steps=1, pin=False)
    second.restore(first.saved())
    for position in (24, 48):
        of_ranks = [one.step(position, accumulation=2) for one in second.loaders]
        found += [as_rows(of_ranks[rank][m]) for m in range(2) for rank in range(2)]
    assert torch.equal(torch.cat(found), expected)


def test_the_seed_orders_the_samples() -> None:
    source = Source(name="a", weight=Fraction(1), rows=windows())
    feeds = [Feed([source], seed=seed, num_lanes=1, num_workers=0, rank=0) for seed in (1, 2)]
    assert feeds[0].places(np.arange(50)) != feeds[1].places(np.arange(50))


# --- streams


def texts_of(lane: Lane, tokenizer: TextTokenizer, num_documents: int) -> list[str]:
    """The next documents of a lane, put together again from its rows."""
    tokens: list[int] = []
    while tokens.count(tokenizer.eos_token_id) <= num_documents:
        tokens += lane.next().tokens[:-1].tolist()
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.eos_token_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.backend.decode(ids) for ids in found[:num_documents]]


@pytest.mark.parametrize("kind", [kind for kind in STREAMS if kind != "txt"])  # whose lines end in other places
@pytest.mark.parametrize("num_lanes", [1, 4, 32])
def test_the_lanes_read_each_document_once_an_epoch(
    kind: str,
    num_lanes: int,
    files: dict[str, tuple[DataFile, ...]],
    encoder: EncoderSpec,
    tokenizer: TextTokenizer,
) -> None:
    spec = spec_of(files[kind], encoder)
    found = []
    for number in range(num_lanes):
        parts = lane_parts(spec.files, lane=number, num_lanes=num_lanes)
        held = sum(
            document.ends_document
            for file, part in parts
            for document in read_documents(file, columns=encoder.columns, part=part, skip=0)
        )
        lane = Lane(spec, spec.encoder.build(), lane=number, num_lanes=num_lanes, cursor=Cursor())
        both = texts_of(lane, tokenizer, 2 * held)
        first, second = both[:held], both[held:]
        assert sorted(first) == sorted(second)
        if held > 20:
            assert first != second  # another order in each epoch
        found += first
    assert sorted(found) == sorted(numbered_texts())


def test_a_window_shuffles_so_far_and_no_farther(
    files: dict[str, tuple[DataFile, ...]], encoder: EncoderSpec, tokenizer: TextTokenizer
) -> None:
    lane = Lane(spec_of(files["one"], encoder, window=10), encoder.build(), lane=0, num_lanes=1, cursor=Cursor())
    found = [int(text.split()[0]) for text in texts_of(lane, tokenizer, 160)]
    assert [sorted(found[begin : begin + 10]) for begin in range(0, 160, 10)] == [
        list(range(begin, begin + 10)) for begin in range(0, 160, 10)
    ]
    assert found != sorted(found)
    other = Lane(
        spec_of(files["one"], encoder, window=10, seed=4), encoder.build(), lane=0, num_lanes=1, cursor=Cursor()
    )
    assert [int(text.split()[0]) for text in texts_of(other, tokenizer, 160)] != found


def test_a_lane_goes_on_from_any_cursor(files: dict[str, tuple[DataFile, ...]], encoder: EncoderSpec) -> None:
    spec = spec_of(files["packed"], encoder)
    lane = Lane(spec, spec.encoder.build(), lane=1, num_lanes=5, cursor=Cursor())
    cursors, rows = [], []
    for _ in range(300):  # some epochs
        cursors.append(lane.cursor)
        rows.append(lane.next().tokens)
    assert cursors[-1].epoch >= 2
    for start in (1, 17, 160, 299):
        resumed = Lane(spec, spec.encoder.build(), lane=1, num_lanes=5, cursor=cursors[start])
        np.testing.assert_array_equal(resumed.next().tokens, rows[start])


def test_held_out_documents_never_train(
    files: dict[str, tuple[DataFile, ...]], encoder: EncoderSpec, tokenizer: TextTokenizer
) -> None:
    spec = spec_of(files["one"], encoder, val_share=0.2)
    kept = [
        document
        for document in read_documents(spec.files[0], columns=("text",), part=WHOLE, skip=0)
        if not validates(document, 0.2)
    ]
    assert 100 < len(kept) < 150
    lane = Lane(spec, spec.encoder.build(), lane=0, num_lanes=1, cursor=Cursor())
    found = texts_of(lane, tokenizer, len(kept))
    assert sorted(found) == sorted(json.loads(document.content)["text"] for document in kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_malformed_rows_are_refused_with_their_line_or_passed_over(
    num_workers: int, tmp_path: Path, encoder: EncoderSpec
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines(numbered_texts()[:5]) + b'{"text": 5}\n' + lines(numbered_texts()[5:30]))
    for rows in ("refuse", "skip"):
        source = Source(
            name="text", weight=Fraction(1), rows=spec_of((data_file(path),), encoder, malformed_rows=rows, window=1)
        )
        feed = Feed([source], seed=1, num_lanes=1, num_workers=num_workers, rank=0)
        loader = Loader(
            feed, Share(rank=0, world_size=1, batch_size=4), context_tokens=CONTEXT, prefetch_steps=0, pin=False
        )
        try:
            if rows == "refuse":
                with pytest.raises(DataError, match=r"text.jsonl line 6.*--malformed_rows=skip"):
                    for position in range(0, 400, 4):
                        loader.step(position, accumulation=1)
            else:
                for position in range(0, 100, 4):
                    loader.step(position, accumulation=1)
        finally:
            loader.close()


def test_a_lane_without_documents_says_so(tmp_path: Path, encoder: EncoderSpec) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines(["only one"]))
    spec = spec_of((data_file(path),), encoder)
    with pytest.raises(DataError, match=r"fewer documents than a step has sequences.*--streaming=0"):
        for lane in range(2):
            Lane(spec, spec.encoder.build(), lane=lane, num_lanes=2, cursor=Cursor()).next()


# --- workers


@pytest.fixture
def stream(files: dict[str, tuple[DataFile, ...]], encoder: EncoderSpec) -> list[Source]:
    return [
        Source(name="packed", weight=Fraction(2), rows=spec_of(files["packed"], encoder)),
        Source(name="one", weight=Fraction(1), rows=spec_of(files["one"], encoder)),
    ]


def test_any_number_of_workers_gives_the_same_and_a_killed_one_is_replaced(stream: list[Source]) -> None:
    expected = Run(stream, world_size=1).steps(0, 12)
    run = Run(stream, world_size=1, num_workers=2, prefetch=2)
    try:
        found = run.steps(0, 4)
        lanes = run.feeds[0]._lanes
        assert lanes is not None
        first, second = lanes.pids
        os.kill(first, signal.SIGKILL)
        found += run.steps(4, 4)
        assert lanes.pids[0] != first and lanes.pids[1] == second
        os.kill(second, signal.SIGTERM)  # as a launcher does to the whole process group: it goes on
        found += run.steps(8, 4)
        assert lanes.pids[1] == second
        assert equal(found, expected)
        again = Run(stream, world_size=1)
        again.restore(run.saved())
        assert equal(again.steps(12, 3), Run(stream, world_size=1).steps(0, 15)[12:])
    finally:
        run.close()


def test_a_worker_that_keeps_dying_ends_the_run_with_the_reason(stream: list[Source]) -> None:
    run = Run(stream, world_size=1, num_workers=1)
    try:
        step = 0
        with pytest.raises(DataError, match=r"exit code -9.*memory.*--num_workers"):
            for _ in range(MAX_DEATHS + 1):
                run.steps(step, 1)
                step += 1
                lanes = run.feeds[0]._lanes
                assert lanes is not None
                os.kill(lanes.pids[0], signal.SIGKILL)
            run.steps(step, 1)
    finally:
        run.close()


def test_cursors_of_another_stream_are_refused(stream: list[Source]) -> None:
    feed = feed_of(stream)
    with pytest.raises(CheckpointError, match="expected 96"):
        feed.restore(8, cursors=encoded_cursors(np.zeros((1, 8, 6), dtype=np.int64)))


def test_an_indexed_source_alone_is_ordered_by_the_seed_of_the_run() -> None:
    rows = windows()
    feed = Feed([Source(name="a", weight=Fraction(1), rows=rows)], seed=11, num_lanes=64, num_workers=0, rank=0)
    expected = SampleOrder(rows.num_samples, 11).samples(0, 300).tolist()
    assert [place.sample for place in feed.places(np.arange(300))] == expected
