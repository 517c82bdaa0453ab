"""Dollars: nodes x hours x price, and what kept checkpoints cost in S3. What is not known is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass

from ..catalog.instances import Price
from .bytes import state_bytes
from .job import Job

# S3 Standard, us-east-1, first 50 TB, per GB and month (aws.amazon.com/s3/pricing, read 2026-11).
S3_DOLLARS_PER_GB_MONTH = 0.023


@dataclass(frozen=True)
class Cost:
    """What a training costs. `formula` is how `dollars` came about, for people; both None where a factor is unknown."""

    price: Price | None
    dollars: float | None
    formula: str | None
    checkpoint_bytes: int
    storage_dollars_per_month: float


def cost(job: Job, price: Price | None, *, hours: float | None) -> Cost:
    """The cost of `hours` on the job's nodes at `price` an hour each, billed by the second.

    Storage is that of the checkpoints kept in S3, none without that tier; S3's GB is taken as 10^9 bytes.
    """
    dollars = formula = None
    if price is not None and hours is not None:
        dollars = job.num_nodes * hours * price.dollars_per_hour
        formula = f"{job.num_nodes} x {hours:,.4g} h x ${price.dollars_per_hour:,.2f} = ${dollars:,.2f}"
    kept = job.checkpoint.keep_s3_checkpoints if job.checkpoint.s3_tier_base_path is not None else 0
    size = state_bytes(job)
    return Cost(
        price=price,
        dollars=dollars,
        formula=formula,
        checkpoint_bytes=size,
        storage_dollars_per_month=kept * size / 1e9 * S3_DOLLARS_PER_GB_MONTH,
    )
