"""Differences of values between checkpoints that are cut into different boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import checkpoint_ranks as ranks
import pytest
import torch
from tests.rank_pool import RankPool
from tiny import disk, values

from hypershard.checkpoint.compare import Comparison, Side, compare
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import find_place
from hypershard.checkpoint.snapshot import take_snapshot


def side(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **facts: object) -> Side:
    if tensors is not None:
        disk(directory).save(1, take_snapshot(tensors), facts, Lineage(1, "first"))
    stored = find_place(str(directory)).finished()[0]
    return Side(stored, stored.manifest())


def compared(one: Side, other: Side) -> Comparison:
    return compare(one, other, pattern=None, with_values=True)


def test_every_element_is_compared_whatever_the_boxes(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    pools(3).run(ranks.save, str(tmp_path / "three"), 1, 0, False)
    pools(2).run(ranks.save, str(tmp_path / "two"), 1, 0, False)
    changed = values(1)
    changed["model/embedding"][6, 2] += 1
    sides = [side(tmp_path / "three"), side(tmp_path / "two"), side(tmp_path / "one", values(1), tokens=1)]
    for one in sides:
        for other in sides:
            assert compared(one, other).is_equal
    other = side(tmp_path / "changed", changed, tokens=1)
    for one in sides:
        for pair in ((one, other), (other, one)):
            found = compared(*pair)
            (tensor,) = [tensor for tensor in found.tensors if not tensor.is_equal]
            assert tensor.name == "model/embedding" and not found.facts
            assert tensor.values is not None
            assert (tensor.values.num_differing, tensor.values.num_compared) == (1, 21)
            assert tensor.values.max_absolute == pytest.approx(1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, math.nan, 4.0]), (1, 1.0, 0.25)),
        (torch.tensor([math.inf, 0.0, 1.0]), torch.tensor([math.inf, -0.0, 1.0]), (0, 0.0, 0.0)),
        (torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0]), (1, math.inf, math.inf)),
        (torch.tensor([0.0]), torch.tensor([math.nan]), (1, math.inf, math.inf)),
        (torch.tensor([2**62 + 1, 5]), torch.tensor([2**62, 5]), (1, 0.0, 0.0)),  # float64 cannot say by how much
        (torch.tensor([True, False]), torch.tensor([True, True]), (1, 1.0, 1.0)),
        (torch.tensor([1.0, 1.004]), torch.tensor([1.0, 1.004]).bfloat16(), (1, 0.003813, 0.003783)),
        (torch.tensor(7), torch.tensor(7), (0, 0.0, 0.0)),
    ],
)
def test_what_counts_as_different(
    tmp_path: Path, one: torch.Tensor, other: torch.Tensor, expected: tuple[int, float, float]
) -> None:
    num_differing, max_absolute, max_relative = expected
    # A neighbour that differs, so that equal ones are read and not passed over by their sums.
    sides = [
        side(tmp_path / name, {"a": tensor, "b": torch.tensor(number)})
        for number, (name, tensor) in enumerate({"one": one, "other": other}.items())
    ]
    values = compared(*sides).tensors[0].values
    assert values is not None and values.num_differing == num_differing
    assert values.max_absolute == pytest.approx(max_absolute, rel=1e-2)
    assert values.max_relative == pytest.approx(max_relative, rel=1e-2)


def test_large_tensors_are_compared_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypershard.checkpoint.compare._SLICE_ELEMENTS", 7)
    one = torch.arange(30, dtype=torch.float32).reshape(6, 5)
    other = one.clone()
    other[0, 0], other[5, 4] = 3, 30
    found = compared(side(tmp_path / "one", {"x": one}), side(tmp_path / "other", {"x": other}))
    values = found.tensors[0].values
    assert values is not None and (values.num_differing, values.max_absolute) == (2, 3.0)
    length = float(other.double().square().sum().sqrt())
    assert values.relative == pytest.approx(math.sqrt(3**2 + 1) / length)


def test_facts_are_named_by_their_path(tmp_path: Path) -> None:
    one = side(tmp_path / "one", {"x": torch.ones(1)}, model={"layers": 2, "eos": None}, tokens=1)
    other = side(tmp_path / "other", {"x": torch.ones(1)}, model={"layers": 3}, tokens=1)
    assert compared(one, other).facts == {"model.layers": ("2", "3"), "model.eos": ("null", None)}
