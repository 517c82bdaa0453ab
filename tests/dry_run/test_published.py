"""The trace against numbers that others measured or published, against the closed form, and against itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.dry_run_cases import LARGE_LORA, REPEATED, REPEATED_LORA, SHALLOW, STRATEGIES
from tests.plan_jobs import job_of

from hypershard.plan import bytes as memory
from hypershard.plan.job import sizes_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Every case of tests/dry_run_cases.py."""
    done = subprocess.run(
        (sys.executable, "-m", "tests.dry_run_cases"),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_llama_3_2_1b_is_the_published_trace(traced: dict[str, Any]) -> None:
    """torch's own tracker, 8 GPUs, context 2,048, full checkpointing, all logits held: 5,551 MiB in use, all layers
    traced; the same layers' replay says 7,366 MiB reserved."""
    assert traced["1b/16"]["active"] / MIB == pytest.approx(5551, rel=0.01)
    assert traced["1b/16"]["reserved"] / MIB == pytest.approx(7366, rel=0.01)


def test_memory_in_use_is_linear_in_depth(traced: dict[str, Any]) -> None:
    """95.0 MiB a layer: 87 of weights and moments, 8 of activations."""
    active = {depth: traced[f"1b/{depth}"]["active"] / MIB for depth in (2, 4, 8, 16)}
    slopes = [(active[deep] - active[few]) / (deep - few) for few, deep in ((2, 4), (4, 8), (8, 16))]
    assert slopes == pytest.approx([95.0] * 3, rel=0.001)


@pytest.mark.parametrize(("num_gpus", "measured_gib"), [(8, 82.4), (128, 67.0)])
def test_readings_of_torchtitan(traced: dict[str, Any], num_gpus: int, measured_gib: float) -> None:
    """Llama-3.1-8B, batch 2 x 8,192, selective, eager, as in torchtitan's benchmarks/llama3_h100_202412."""
    assert traced[f"8b/{num_gpus}"]["reserved"] / GIB == pytest.approx(measured_gib, rel=0.05)


def test_our_loss_holds_less_than_all_logits(traced: dict[str, Any]) -> None:
    ours, whole = traced["1b/ours"], traced["1b/16"]
    print(f"\nLlama-3.2-1B with the chunked loss: {ours}")
    assert ours["active"] < whole["active"] and ours["reserved"] < whole["reserved"]
    without_logits = {name: size for name, size in ours["categories"].items() if name in ("weights", "optimizer")}
    assert without_logits == {name: whole["categories"][name] for name in without_logits}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_and_moments_are_the_shards_of_the_closed_form(traced: dict[str, Any], strategy: str) -> None:
    job = job_of("llama3_2_1b", "p5", 2, **SHALLOW, sharding_strategy=strategy)
    shard, num_tensors = sizes_of(job.model).shard(job.shard_degree), sum(sizes_of(job.model).shapes.values())
    tables = 2 * 4 * 32  # two of 32 rotary frequencies, which are no parameters
    if strategy in ("hybrid", "none"):
        tables += 4 * job.num_gpus  # and where each rank is in a mesh of two dimensions
    assert traced[f"start/{strategy}"]["weights"] == 4 * shard + tables
    assert traced[f"start/{strategy}"]["optimizer"] == 8 * shard + 4 * num_tensors  # and AdamW's counts of steps


@pytest.mark.parametrize("model", [*REPEATED, *(f"lora/{name}" for name in REPEATED_LORA)])
def test_layers_repeated_are_layers_traced(traced: dict[str, Any], model: str) -> None:
    """To the byte: what is in use and for what, each stream's most, and what the allocator reserves."""
    repeated, whole = traced[model]
    assert repeated == whole
    assert {window["name"] for window in whole["windows"]} >= {"forward", "loss", "backward"}


@pytest.mark.parametrize("model", LARGE_LORA)
def test_the_closed_form_of_adapters_is_near_the_trace(traced: dict[str, Any], model: str) -> None:
    """As near as that of whole models is (benchmarks/plan_grid.py)."""
    job = job_of(model, **LARGE_LORA[model])
    closed = memory.gpu_fit(job, memory.gpu_moments(job)).needed_bytes
    assert closed == pytest.approx(traced[f"lora/{model}"]["reserved"] + memory.OUTSIDE_BYTES, rel=0.12)
