"""The step's time: against published speeds that were left out of the fit, and by hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.plan_jobs import config_of
from tests.plan_jobs import job_of as job

from hypershard.catalog.gpus import gpus
from hypershard.catalog.instances import instances
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.plan import steps
from hypershard.plan.job import sizes_of
from hypershard.train.attention import choose_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# plan/README.md states these.
LEFT_OUT_MEAN = 0.05
LEFT_OUT_WORST = 0.27
OTHER_SOFTWARE_WORST = 0.26


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_speeds", BENCHMARKS / "fit_speeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("where", ["p5.48xlarge", "p4de.24xlarge"])
def test_a_model_left_out_of_the_fit_is_predicted_within_the_stated_error(fitting: ModuleType, where: str) -> None:
    errors = [abs(error) for _, error in fitting.leave_one_model_out(fitting.rows(), where)]
    assert len(errors) >= 16
    assert sum(errors) / len(errors) < LEFT_OUT_MEAN
    assert max(errors) < LEFT_OUT_WORST < steps.coefficients()["band"]


def test_other_software_is_within_the_band(fitting: ModuleType) -> None:
    content, factors = fitting.rows(), steps.coefficients()["fitted"]["hopper"]["factors"]
    for row in content["check"]:
        error = fitting.predicted(row, content["models"], factors) / row["tokens_per_second_per_gpu"] - 1
        assert abs(error) < OTHER_SOFTWARE_WORST < steps.coefficients()["band"], row["what"]


def test_the_kept_factors_are_those_of_the_fit(fitting: ModuleType) -> None:
    content = fitting.rows()
    for name, where in (("hopper", "p5.48xlarge"), ("ampere", "p4de.24xlarge")):
        chosen = [row for row in content["fit"] if row["instance"] == where]
        kept = json.loads(fitting.COEFFICIENTS.read_text())["fitted"][name]["factors"]
        assert fitting.fit(chosen, content["models"]) == pytest.approx(kept, abs=0.005)


def test_a_published_run_is_planned_as_the_fit_predicts_it(fitting: ModuleType) -> None:
    """The program's own path and the fit's are one: no second formula."""
    content = fitting.rows()
    row = next(row for row in content["fit"] if row["model"] == "7b" and row["context_tokens"] == 2048)
    factors = steps.coefficients()["fitted"]["hopper"]["factors"]
    planned = steps.step_time(fitting.job_of(row, content["models"]))
    assert planned.tokens_per_second_per_gpu == pytest.approx(fitting.predicted(row, content["models"], factors))


def test_products_by_hand() -> None:
    """Llama-3-8B: 7.505 billion parameters in products, 6 FLOPs each, 8,192 tokens, 989 TFLOP/s."""
    by_hand = 8192 * 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) / 989e12
    assert steps.work_of(job("llama3_8b")).products == pytest.approx(by_hand, rel=1e-9)
    # Full checkpointing does the blocks' forward again, a third of forward and backward, the head's not.
    head = 8192 * 6 * 128_256 * 4096 / 989e12
    full = steps.work_of(job("llama3_8b", activation_checkpointing="full")).products
    assert full == pytest.approx(by_hand + (by_hand - head) / 3, rel=1e-9)


def test_parts_add_up_and_mfu_is_what_it_says() -> None:
    planned = job("llama3_8b", num_nodes=4, gradient_accumulation_steps=2, cpu_offload=True)
    step = steps.step_time(planned)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.tokens == 8192 * 2 * 32
    flops = family_of("llama_v3").flops_per_token(planned.model, context_tokens=8192).total
    assert step.mfu == pytest.approx(step.tokens_per_second_per_gpu * flops / 989e12)
    assert step.parts["offload"] > 0


def test_collectives_by_strategy() -> None:
    """parallel/fsdp.py's table: what is gathered in each micro-step, and what once a step."""
    found = {name: steps.communication(job("llama3_8b", "p5", 2, sharding_strategy=name)) for name in
             ("full", "hybrid", "zero2", "zero1", "none")}  # fmt: skip
    assert found["full"].hidden > found["hybrid"].hidden > found["zero2"].hidden > 0
    assert found["zero1"].hidden == found["none"].hidden == 0
    assert found["full"].once == 0 < min(found[name].once for name in ("hybrid", "zero2", "zero1", "none"))
    alone = steps.communication(job("llama3_8b", "p5.4xlarge"))
    assert (alone.hidden, alone.exposed, alone.once, alone.assumptions) == (0, 0, 0, ())


def test_a_gather_of_the_whole_model_by_hand() -> None:
    """16.06 GB over 8 GPUs at 0.75 x 464 GB/s: 7/8 of it on the wire, 40 ms at a large message's speed."""
    planned = job("llama3_8b")
    seconds = steps._moved(2.0 * sizes_of(planned.model).total, 8, 464 * 0.75, 1)
    assert seconds == pytest.approx(16.06e9 * 7 / 8 / 348e9, rel=0.001)
    # Half a small message takes as long as a whole one.
    assert steps._moved(2**19, 8, 464, 1) == pytest.approx(steps._moved(2**18, 8, 464, 1))
    curve = [steps._moved(2.0**size, 8, 464, 1) / 2.0**size for size in range(16, 32)]
    assert curve == sorted(curve, reverse=True)


def test_every_instance_has_a_time_and_says_what_it_assumes() -> None:
    for row in instances():
        step = steps.step_time(job("llama3_8b", row.name, 2))
        measured = row.gpu.name in ("H100 SXM", "H200 SXM", "A100 80 GB", "A100 40 GB")
        assert step.band == steps.coefficients()["band" if measured else "band_borrowed"]
        assert measured or any(row.gpu.name in text for text in step.assumptions)
    assert set(steps.coefficients()["like"]) <= {gpu.name for gpu in gpus()}


def test_an_unknown_peak_is_refused_with_the_flag() -> None:
    with pytest.raises(ConfigError, match="--peak_tflops_per_gpu"):
        steps.step_time(job("llama3_8b", bf16=False))
    assert steps.step_time(job("llama3_8b", bf16=False, peak_tflops_per_gpu=400)).seconds > 0


@pytest.mark.parametrize(
    "flags", [{}, {"document_mask": False}, {"bf16": False}, {"attention": "dense"}, {"head_width": 256}]
)
def test_attention_is_chosen_as_training_chooses_it(flags: dict[str, Any]) -> None:
    planned, config = job("llama3_8b", **flags), config_of("llama3_8b", **flags)
    assert planned.attention_path == choose_attention(config, planned.model, torch.device("cuda")).path


def test_frozen_weights_cost_two_thirds_of_the_products() -> None:
    """2 forward and 2 for the inputs' gradients, of 6 FLOPs a parameter; with recomputation 6 again, of 8."""
    for kind, share in {"none": 4 / 6, "full": 6 / 8}.items():
        whole = steps.work_of(job("llama2_7b", activation_checkpointing=kind))
        frozen = steps.work_of(job("llama2_7b", activation_checkpointing=kind, lora_r=8))
        assert frozen.products == pytest.approx(share * whole.products, rel=0.015)
        assert frozen.attention == whole.attention
        assert frozen.network < 0.8 * whole.network


def test_weights_in_nf4_are_gathered_packed_and_unpacked_in_every_pass() -> None:
    """6.476e9 weights of Llama-2-7B's blocks, twice or, recomputed, three times: 2.5 bytes each, or 14 by parts."""
    for kind, is_compiled, num_bytes in (("none", True, 2 * 2.5), ("full", True, 3 * 2.5), ("none", False, 2 * 14)):
        flags = {"activation_checkpointing": kind, "compile": is_compiled, "lora_r": 8}
        dense, packed = (job("llama2_7b", **flags, **more) for more in ({}, {"bnb_quant_type": "nf4"}))
        more = steps.work_of(packed).memory - steps.work_of(dense).memory
        bandwidth = packed.instance.gpu.memory_tb_per_second * 1e12
        assert more == pytest.approx(num_bytes * 6.476e9 / bandwidth, rel=1e-3)
        assert steps.work_of(packed).products == steps.work_of(dense).products
        assert steps.communication(packed).hidden < 0.4 * steps.communication(dense).hidden


def test_a_reference_costs_another_forward() -> None:
    """Per frozen parameter 2 FLOPs more beside 4, a third more attention; the head's product is computed again."""
    flags = {"lora_r": 8, "activation_checkpointing": "none", "sharding_strategy": "full"}
    alone, compared = job("llama2_7b", **flags), job("llama2_7b", **flags, objective="dpo")
    own, more = steps.work_of(alone), steps.work_of(compared)
    head = 2 * 32_000 * 4096 * alone.micro_tokens / steps.peak_flops(alone)
    assert more.products - head == pytest.approx(6 / 4 * own.products, rel=0.01)
    assert more.attention == pytest.approx(4 / 3 * own.attention)
    again = steps.work_of(job("llama2_7b", **{**flags, "activation_checkpointing": "full"}, objective="dpo"))
    assert again.attention == pytest.approx(5 / 3 * own.attention)  # the reference is not recomputed
    assert more.logits == 2 * own.logits
    assert compared.flops.total > alone.flops.total
    gathers = [steps.communication(one).hidden for one in (alone, compared)]
    assert gathers[1] == pytest.approx(1.5 * gathers[0], rel=0.02)  # adapters' gradients are the rest
