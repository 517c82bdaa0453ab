"""The same run gives the same losses however it is spread.

Between world sizes, strategies and accumulations only the order of float32 sums changes (micro-batches,
reduce-scatter, norm). Tolerances, all relative: step 1 sees rounding alone, 6e-8 an operation and some tens deep,
so 2e-6 for its loss and gradient norm. Later steps see it through AdamW, whose first updates are about
lr x sign(gradient) and so turn the rounding of a near-zero gradient into a whole update of that weight: 2e-5 for
losses, 1e-3 for gradient norms, which are that much more sensitive. Within one layout, offload and activation
checkpointing change no sum at all: those are compared bit for bit.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jobs import a_job, tiny, train_losses
from tests.rank_pool import RankPool

from hypershard.distributed.process_group import World
from hypershard.train.evaluate import evaluate
from hypershard.train.rehearse import rehearse
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

STEPS = 4
Steps = list[tuple[float, float]]  # (loss, gradient norm)


def assert_same_training(found: Steps, expected: Steps) -> None:
    """The module's tolerances, for two runs of as many steps."""
    assert len(found) == len(expected) > 1
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=2e-5)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-3)


@pytest.fixture(scope="module")
def reference(pools: Callable[[int], RankPool], cache_dir: Path) -> Steps:
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
    reference: Steps,
    num_ranks: int,
    settings: dict,
) -> None:
    results = pools(num_ranks).run(train_losses, tiny(**settings), cache_dir, STEPS)
    assert all(result == results[0] for result in results), "ranks disagree about the loss"
    assert_same_training(results[0], reference)


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


@pytest.mark.parametrize(
    "model", ["tiny_mixtral", "tiny_mixtral --num_experts 3", "tiny_llama4", "tiny_gpt2", "tiny_qwen2"]
)
def test_every_family_trains_alike_on_one_and_two_ranks(
    pools: Callable[[int], RankPool], cache_dir: Path, model: str
) -> None:
    """For the families with experts this includes the router's loss, which is counted per sequence.

    Three experts do not divide among two ranks, so each rank holds a part of each of them.
    """
    common = f"--model {model} --num_layers 2 --max_context_width 64 --bf16 0 --max_steps 9 --lr 0.001 --warmup 0"
    one = pools(1).run(train_losses, f"{common} --train_batch_size 4", cache_dir, 3)[0]
    two = pools(2).run(train_losses, f"{common} --train_batch_size 1 --gradient_accumulation_steps 2", cache_dir, 3)[0]
    assert_same_training(two, one)


def test_bf16_computes_in_bf16_and_stays_close(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: Steps
) -> None:
    """bfloat16 has 8 bits of mantissa: losses differ, by less than 1%."""
    settings = {"sharding_strategy": "full", "train_batch_size": 2, "bf16": 1}
    found = pools(2).run(train_losses, tiny(**settings), cache_dir, STEPS)[0]
    assert found != reference
    for (loss, _), (expected, _) in zip(found, reference, strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
    offloaded = pools(2).run(train_losses, tiny(**settings, cpu_offload=1), cache_dir, STEPS)[0]
    assert offloaded == found


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full", "offload_activations": 1, "cpu_offload": 1},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_compiled_blocks_agree(
    pools: Callable[[int], RankPool], cache_dir: Path, reference: Steps, settings: dict
) -> None:
    """The compiler fuses and reorders within a block, so bits may differ but not by more than float32's rounding."""
    found = pools(2).run(train_losses, tiny(train_batch_size=2, compile=1, **settings), cache_dir, STEPS)[0]
    assert_same_training(found, reference)


def graphs_after_the_rehearsal(world: World, flags: str, cache_dir: Path) -> tuple[int, int]:
    """Graphs the compiler made in the rehearsal, and in the steps and the validation after it."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with a_job(world, flags, cache_dir) as job:
        # Preferences need more than torch's own 8 for one code: of reference and policy, with and without a mask.
        assert torch._dynamo.config.recompile_limit >= 16
        rehearse(job)
        rehearsed = counters["stats"]["unique_graphs"]
        progress = Progress()
        for _ in range(3):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=0.0)
        evaluate(job)
        return rehearsed, counters["stats"]["unique_graphs"] - rehearsed


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_blocks_share_their_graphs_and_all_are_made_in_the_rehearsal(
    pools: Callable[[int], RankPool], cache_dir: Path
) -> None:
    """Training and validation, with and without packed documents: four graphs, for one layer or for twelve."""
    flags = tiny(num_layers=12, compile=1, train_batch_size=1)
    assert pools(1).run(graphs_after_the_rehearsal, flags, cache_dir)[0] == (4, 0)
