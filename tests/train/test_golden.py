"""Losses that a refactor must not change: first weights, sample order, packing, model, loss and optimizer at once.

Written by `python -m tests.train.test_golden` on one CPU rank in float32. Other processors and versions of torch
round otherwise, by some 1e-7 an operation: 2e-6 for the first loss, 2e-5 after AdamW has amplified it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jobs import train_losses
from tests.rank_pool import RankPool

from hypershard.data.order import SampleOrder

GOLDEN = Path(__file__).with_name("golden_losses.json")
FAMILIES = ("tiny_llama", "tiny_llama2", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4")
FLAGS = "--num_layers 2 --max_context_width 64 --train_batch_size 4 --max_steps 50 --lr 0.001 --warmup 0 --bf16 0"
STEPS = 4


def losses(pool: RankPool, model: str, cache_dir: Path) -> list[float]:
    return [loss for loss, _ in pool.run(train_losses, f"--model {model} {FLAGS}", cache_dir, STEPS)[0]]


@pytest.mark.parametrize("model", FAMILIES)
def test_losses_are_what_they_were(pools: Callable[[int], RankPool], cache_dir: Path, model: str) -> None:
    expected = json.loads(GOLDEN.read_text())[model]
    found = losses(pools(1), model, cache_dir)
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    assert found == pytest.approx(expected, rel=2e-5)


def test_the_order_of_samples_is_what_it_was() -> None:
    """A run that is resumed by a later version must go on with the same samples."""
    assert SampleOrder(1000, seed=42).samples(995, 10).tolist() == json.loads(GOLDEN.read_text())["order"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        alone = RankPool(1)
        values: dict[str, list[float]] = {model: losses(alone, model, Path(folder)) for model in FAMILIES}
        alone.close()
    values["order"] = SampleOrder(1000, seed=42).samples(995, 10).tolist()
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
