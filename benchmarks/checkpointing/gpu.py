"""On a GPU: how much later the training's stream is done because a save began, by the stream's own clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hypershard.checkpoint.manager import CheckpointManager
from hypershard.train.setup import Job
from hypershard.train.state import Progress

from .case import Bench

_WIDTH = 8192  # of the square matrices that stand for the training
_FIRST_STEP = 10**6


def measure(
    bench: Bench, job: Job, manager: CheckpointManager, plain: Callable[[int], Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds of the same matrix products alone, with a memory save begun before them and settled after, and behind
    `plain`, a copy to pinned memory that is waited for. One entry per round, of the slowest rank."""
    tensors, facts = job.tensors, job.facts(Progress())
    copy_seconds = bench.timed(lambda: plain(0))
    left = torch.randn(_WIDTH, _WIDTH, device=bench.world.device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    product = torch.empty_like(left)

    def work(num_products: int) -> None:
        for _ in range(num_products):
            torch.mm(left, right, out=product)

    work(10)
    # Twice as long as the copy, as a step should be that hides it; the same number on all ranks.
    num_products = math.ceil(2 * copy_seconds / (bench.timed(lambda: work(10)) / 10))
    step = _FIRST_STEP

    def save() -> None:
        manager.save(step, tensors(), facts, due=["memory"])

    ways: Sequence[tuple[str, Callable[[], Any], Callable[[], Any]]] = (
        ("products alone", lambda: None, lambda: None),
        ("with a save to the memory tier", save, manager.settle),
        ("behind a plain copy to pinned memory", lambda: plain(0), lambda: None),
    )
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for number in range(rounds + 1):
        for name, before, after in ways:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            bench.start_line()
            begin.record()
            before()
            work(num_products)
            after()
            end.record()
            torch.cuda.synchronize()
            took = bench.slowest([begin.elapsed_time(end) / 1000])[0]
            manager.finish()
            if number:
                seconds[name].append(took)
        step += 1
    return seconds
