"""Dollars: the product of three numbers, or unknown."""

from dataclasses import replace

import pytest
from tests.plan_jobs import job_of

from hypershard.catalog.instances import Price
from hypershard.plan.dollars import cost
from hypershard.plan.job import Job

PRICE = Price(dollars_per_hour=55.04, kind="listed", region="us-east-1", date="2026-07-20", source="a list")


@pytest.fixture
def job() -> Job:
    return job_of("llama3_8b", "p5", 4)


def test_nodes_times_hours_times_price(job: Job) -> None:
    made = cost(job, PRICE, hours=10.0)
    assert made.dollars == pytest.approx(4 * 10 * 55.04)
    assert made.formula == "4 x 10 h x $55.04 = $2,201.60"


def test_unknown_is_none_and_never_zero(job: Job) -> None:
    assert cost(job, None, hours=10.0).dollars is None
    assert cost(job, PRICE, hours=None).dollars is None


def test_storage_is_of_the_checkpoints_kept_in_s3(job: Job) -> None:
    assert cost(job, None, hours=None).storage_dollars_per_month == 0
    tiers = replace(job.checkpoint, s3_tier_base_path="s3://bucket/run", keep_s3_checkpoints=2)
    kept = cost(replace(job, checkpoint=tiers), None, hours=None)
    assert kept.checkpoint_bytes == 12 * 8_030_261_248  # a weight and two moments in float32
    assert kept.storage_dollars_per_month == pytest.approx(2 * 96.363 * 0.023, rel=1e-4)
