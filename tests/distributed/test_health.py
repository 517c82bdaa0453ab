"""The all-reduce of the health check, on real ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from tests.rank_pool import RankPool

from hypershard.distributed.health import measure_all_reduce
from hypershard.distributed.process_group import World


def measured(world: World) -> tuple[int, int, float, float, bool]:
    result = measure_all_reduce(torch.device("cpu"), num_bytes=2**12)
    return result.num_ranks, result.num_bytes, result.seconds, result.gb_per_second, result.is_right


def measured_with_a_flipped_bit(world: World) -> bool:
    """Rank 1's memory changes one element before the sum."""
    kept = torch.full

    def full(*arguments: object, **options: object) -> torch.Tensor:
        data = kept(*arguments, **options)  # type: ignore[call-overload]
        if dist.get_rank() == 1 and data.numel() > 2:
            data[7] += 1
        return data

    torch.full = full  # type: ignore[assignment]
    try:
        return measure_all_reduce(torch.device("cpu"), num_bytes=2**12).is_right
    finally:
        torch.full = kept


def test_all_ranks_report_the_same(pools: Callable[[int], RankPool]) -> None:
    first, second = pools(2).run(measured)
    assert first == second
    num_ranks, num_bytes, seconds, speed, is_right = first
    assert (num_ranks, num_bytes, is_right) == (2, 2**12, True)
    assert speed == pytest.approx(num_bytes / seconds / 1e9)  # 2 (n-1)/n is 1 for two ranks


def test_one_wrong_element_on_one_rank_is_seen_by_all(pools: Callable[[int], RankPool]) -> None:
    assert pools(2).run(measured_with_a_flipped_bit) == [False, False]
