"""The same run gives the same losses however it is spread.

Tolerance: 2e-5 relative in float32. Between world sizes, strategies and accumulations only the order of sums
changes (micro-batches, reduce-scatter, norm); float32 carries 6e-8 per operation, some hundred operations deep
and amplified by AdamW's division in early steps. Within one layout, offload and checkpointing change no sum at
all, so those are compared bit for bit.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jobs import tiny, train_losses
from tests.rank_pool import RankPool

STEPS = 4
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def reference(pools: Callable[[int], RankPool], cache_dir: Path) -> list[tuple[float, float]]:
    """One rank, whole model, no accumulation: what everything else must reproduce."""
    flags = tiny(sharding_strategy="none", train_batch_size=4)
    return pools(1).run(train_losses, flags, cache_dir, STEPS)[0]


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {"sharding_strategy": "full"}),
        (1, {"sharding_strategy": "full", "train_batch_size": 1, "gradient_accumulation_steps": 4}),
        *[(2, {"sharding_strategy": name, "train_batch_size": 2}) for name in ("full", "zero1", "zero2", "none")],
        (2, {"sharding_strategy": "hybrid", "hybrid_shard_degree": 1, "train_batch_size": 2}),
        *[
            (2, {"sharding_strategy": name, "train_batch_size": 1, "gradient_accumulation_steps": 2})
            for name in ("full", "zero1", "zero2", "none")
        ],
        (4, {"sharding_strategy": "full", "train_batch_size": 1}),
        (4, {"sharding_strategy": "hybrid", "hybrid_shard_degree": 2, "train_batch_size": 1}),
        (4, {"sharding_strategy": "zero1", "train_batch_size": 1}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_losses_do_not_depend_on_the_layout(
    pools: Callable[[int], RankPool],
    cache_dir: Path,
    reference: list[tuple[float, float]],
    num_ranks: int,
    settings: dict,
) -> None:
    results = pools(num_ranks).run(train_losses, tiny(**settings), cache_dir, STEPS)
    assert all(result == results[0] for result in results), "ranks disagree about the loss"
    for found, expected in zip(results[0], reference, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["full", "zero1"])
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"offload_activations": 1},
        {"activation_checkpointing": "full", "offload_activations": 1},
        {"cpu_offload": 1},
        {"cpu_offload": 1, "activation_checkpointing": "full", "offload_activations": 1},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_what_trades_memory_changes_no_bit(
    pools: Callable[[int], RankPool], cache_dir: Path, strategy: str, settings: dict
) -> None:
    base = {"sharding_strategy": strategy, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    plain = pools(2).run(train_losses, tiny(**base), cache_dir, 2)[0]
    assert pools(2).run(train_losses, tiny(**base, **settings), cache_dir, 2)[0] == plain


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_llama4", "tiny_gpt2", "tiny_qwen2"])
def test_every_family_trains_alike_on_one_and_two_ranks(
    pools: Callable[[int], RankPool], cache_dir: Path, model: str
) -> None:
    """For the families with experts this includes the router's loss, which is counted per sequence."""
    common = f"--model {model} --num_layers 2 --max_context_width 64 --bf16 0 --max_steps 9 --lr 0.001 --warmup 0"
    one = pools(1).run(train_losses, f"{common} --train_batch_size 4", cache_dir, 3)[0]
    two = pools(2).run(train_losses, f"{common} --train_batch_size 1 --gradient_accumulation_steps 2", cache_dir, 3)[0]
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_bf16_computes_in_bf16_and_stays_close(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: list[tuple[float, float]]
) -> None:
    """bfloat16 has 8 bits of mantissa: losses differ, by less than 1%."""
    settings = {"sharding_strategy": "full", "train_batch_size": 2, "bf16": 1}
    found = pools(2).run(train_losses, tiny(**settings), cache_dir, STEPS)[0]
    assert found != reference
    for (loss, _), (expected, _) in zip(found, reference, strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
    offloaded = pools(2).run(train_losses, tiny(**settings, cpu_offload=1), cache_dir, STEPS)[0]
    assert offloaded == found


def test_compiled_blocks_agree(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: list[tuple[float, float]]
) -> None:
    """The compiler fuses and reorders within a block, so bits may differ but not by more than float32's rounding."""
    settings = {"sharding_strategy": "full", "train_batch_size": 2, "compile": 1, "activation_checkpointing": "full"}
    found = pools(2).run(train_losses, tiny(**settings), cache_dir, STEPS)[0]
    for step, expected in zip(found, reference, strict=True):
        assert step == pytest.approx(expected, rel=TOLERANCE)
