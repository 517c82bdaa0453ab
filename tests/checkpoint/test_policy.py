from __future__ import annotations

import pytest

from hypershard.checkpoint.policy import is_due, steps_to_delete


@pytest.mark.parametrize(
    ("step", "every", "last_step", "due"),
    [
        (10, 10, None, True),
        (11, 10, None, False),
        (0, 10, None, False),
        (11, 10, 11, True),
        (11, None, 11, True),
        (10, None, 11, False),
        (10, None, None, False),
        (20, 10, 5, True),
    ],
)
def test_is_due(step: int, every: int | None, last_step: int | None, due: bool) -> None:
    assert is_due(step, every, last_step) is due


@pytest.mark.parametrize(
    ("steps", "keep", "deleted"),
    [([30, 10, 20], 2, [10]), ([10], 1, []), ([], 3, []), ([1, 2, 3], 1, [1, 2]), ([1, 2, 2], 2, []), ([1, 2], 0, [1])],
)
def test_steps_to_delete(steps: list[int], keep: int, deleted: list[int]) -> None:
    assert steps_to_delete(steps, keep) == deleted
