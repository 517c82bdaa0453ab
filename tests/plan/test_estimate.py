"""The plan as a whole: every model file, verdicts, what makes a job fit, hours."""

import json
from dataclasses import replace

import pytest
from tests.plan_jobs import job_of as job

from hypershard.catalog.instances import Price
from hypershard.errors import ConfigError
from hypershard.models.files import available_models
from hypershard.plan.estimate import Plan, as_dict, changed, find_remedy, memory_of, plan
from hypershard.plan.job import Job

PRICE = Price(dollars_per_hour=10.0, kind="given", region=None, date=None, source="here")
# SPEC: exact counts; those given there as "about" stand with what the shapes make.
COUNTS = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mathstral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_r1_distill_qwen_32b": 32_763_876_352,
    "llama4_scout_17b_16e": 107_769_861_120,
}
ACTIVE = {"mixtral_8x7b": 12_879_925_248, "llama4_scout_17b_16e": 17_172_894_720}


def made(planned: Job, *, dataset_tokens: int | None = None, speed: float | None = None) -> Plan:
    return plan(planned, price=PRICE, dataset_tokens=dataset_tokens, tokens_per_second_per_gpu=speed)


@pytest.mark.parametrize("name", available_models())
def test_every_model_file_is_planned(name: str) -> None:
    found = made(job(name, max_steps=10))
    assert found.hours is not None and found.hours > 0 and found.cost.dollars is not None
    assert found.memory.verdict in ("fits", "tight", "does not fit")
    assert json.loads(json.dumps(as_dict(found)))["model"]["parameters"] == found.sizes.total
    if name in COUNTS:
        assert found.sizes.total == COUNTS[name]
    if name in ACTIVE:
        assert found.sizes.active == ACTIVE[name]
    assert (found.sizes.active == found.sizes.total) == (found.job.model.num_experts is None)


def test_counts_given_as_about() -> None:
    assert made(job("llama_1_36b")).sizes.total / 1e9 == pytest.approx(1.294, abs=0.001)
    assert made(job("gpt2_1_36b")).sizes.total / 1e9 == pytest.approx(1.405, abs=0.001)


def test_8b_does_not_fit_a_g5_and_the_named_changes_make_it_fit() -> None:
    planned = job("llama3_8b", "g5.12xlarge")
    found = made(planned)
    assert found.memory.verdict == "does not fit"
    assert found.memory.dominant.name == "activations"
    assert found.remedy is not None and found.remedy.changes
    assert memory_of(changed(planned, found.remedy.changes)).verdict == "fits"
    for left_out in found.remedy.changes:  # none is superfluous
        fewer = tuple(change for change in found.remedy.changes if change != left_out)
        assert memory_of(changed(planned, fewer)).verdict != "fits"


def test_one_change_is_named_where_one_is_enough() -> None:
    planned = job("llama3_8b", "p5", 1, train_batch_size=2)
    found = made(planned)
    assert found.memory.verdict == "does not fit"
    assert found.remedy is not None
    assert [str(change) for change in found.remedy.changes] == ["--activation_checkpointing=selective"]
    assert memory_of(changed(planned, found.remedy.changes)).verdict == "fits"


def test_nodes_that_are_enough() -> None:
    planned = job("llama3_1_70b", "p5", 1, activation_checkpointing="full")
    remedy = find_remedy(planned)
    assert remedy.num_nodes is not None
    assert memory_of(replace(planned, num_nodes=remedy.num_nodes)).verdict == "fits"
    assert memory_of(replace(planned, num_nodes=remedy.num_nodes // 2)).verdict != "fits"


def test_a_host_that_is_too_small_is_a_verdict_too() -> None:
    planned = job("llama3_2_3b", "g6e.12xlarge", 1, max_context_width=1024, sharding_strategy="none", bf16=True)
    found = memory_of(replace(planned, instance=replace(planned.instance, ram_gib=64, gpu_memory_mib=2**18)))
    assert (found.gpu.verdict, found.host.verdict, found.verdict) == ("fits", "does not fit", "does not fit")


def test_hours_follow_from_steps_epochs_or_a_measured_speed() -> None:
    by_steps = made(job("llama3_8b", max_steps=100))
    assert by_steps.step is not None and by_steps.hours == pytest.approx(100 * by_steps.step.seconds / 3600)
    tokens = 100 * by_steps.job.step_tokens
    assert made(job("llama3_8b", epochs=3), dataset_tokens=tokens).num_steps == 300
    assert made(job("llama3_8b"), dataset_tokens=tokens).num_steps == 100  # one epoch, as `train` takes it
    assert made(job("llama3_8b", epochs=3, max_steps=50), dataset_tokens=tokens).num_steps == 50
    measured = made(job("llama3_8b", max_steps=100), speed=8192 / 2)
    assert measured.hours == pytest.approx(100 * 2 / 3600)
    unknown = made(job("llama3_8b", epochs=3))
    assert unknown.hours is None and any("--dataset_tokens" in text for text in unknown.unknown)


def test_time_that_is_unknown_is_said() -> None:
    found = made(job("llama3_8b", bf16=False, max_steps=10))
    assert found.step is None and found.hours is None and found.cost.dollars is None
    assert any("--peak_tflops_per_gpu" in text for text in found.unknown)


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="--hybrid_shard_degree=3"):
        made(job("llama3_8b", sharding_strategy="hybrid", hybrid_shard_degree=3))
