"""A run's ledger names exactly what each step trained on, through restarts, other batch sizes and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_feed import CONTEXT, GLOBAL_BATCH, Run, encoder, feed_of, files, sources  # noqa: F401 (fixtures)

from hypershard.data.feed import Feed, Source
from hypershard.data.ledger import read_ledger
from hypershard.errors import DataError


def started(step: int, samples: int, *, samples_per_step: int = GLOBAL_BATCH) -> dict[str, Any]:
    return {
        "event": "started",
        "step": step,
        "samples": samples,
        "samples_per_step": samples_per_step,
        "num_lanes": GLOBAL_BATCH,
    }


def test_every_step_is_read_back(sources: list[Source]) -> None:  # noqa: F811
    run = Run(sources, world_size=2)
    events: list[dict[str, Any]] = [started(0, 0)]
    if run.feeds[0].num_lanes == 1:
        events[0]["num_lanes"] = 1
    trained = []
    for step in range(1, 9):
        trained += run.steps(step - 1, 1)
        if step in (3, 6):
            cursors = run.saved()[1] if run.feeds[0].is_stream else None
            events.append({"event": "saved", "step": step, "cursors": cursors})
    events.append({"event": "stopped", "step": 8})
    ledger = read_ledger(events)
    feed = feed_of(sources)
    for step in (8, 1, 4, 7):
        samples = list(ledger.samples(feed, step))
        assert [sample.position for sample in samples] == list(range((step - 1) * 8, step * 8))
        assert len({sample.digest for sample in samples}) == 8
        for sample, row in zip(samples, trained[step - 1], strict=True):
            size = min(len(sample.tokens), CONTEXT)
            assert sample.tokens[:size].tolist() == row[0][:size].tolist()
            assert sample.documents
    for step in (0, 9):
        with pytest.raises(DataError, match=f"--step={step}"):
            list(ledger.samples(feed, step))
    run.close()


def test_steps_done_again_count_as_the_restart_did_them(tmp_path: Path) -> None:
    events = [
        started(0, 0),
        {"event": "saved", "step": 4, "cursors": "first"},
        {"event": "saved", "step": 8, "cursors": "lost"},
        started(4, 32, samples_per_step=16),
        {"event": "saved", "step": 8, "cursors": "second"},
        {"event": "stopped", "step": 10},
    ]
    ledger = read_ledger(events)
    assert [(one.first_step, one.last_step, one.first_position) for one in ledger.segments] == [(1, 4, 0), (5, 10, 32)]
    assert dict(ledger.cursors) == {4: "first", 8: "second"}
    assert ledger.segment(6).samples_per_step == 16
    anew = read_ledger([*events, started(10, 0)])  # other data, from their beginning
    assert anew.segment(11).first_position == 0 and not anew.cursors


def test_events_without_a_start_are_refused() -> None:
    with pytest.raises(DataError, match="records no start"):
        read_ledger([{"event": "saved", "step": 4, "cursors": None}])


def test_a_ledger_feed_is_any_feed(sources: list[Source]) -> None:  # noqa: F811
    """The number of lanes comes from the ledger, not from the feed that reads."""
    other = Feed(sources, seed=7, num_lanes=3, num_workers=0, rank=0)
    lanes = GLOBAL_BATCH if other.is_stream else 1
    ledger = read_ledger([{**started(0, 0), "num_lanes": lanes}])
    found = [sample.digest for sample in ledger.samples(other, 2)]
    assert found == [sample.digest for sample in ledger.samples(feed_of(sources), 2)]
