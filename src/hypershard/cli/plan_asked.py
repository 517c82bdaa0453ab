"""What `hypershard plan` is asked: its flags as a job, a price, and what is known of the data and of speeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..catalog.instances import Price, instance, price
from ..config.schema import Config
from ..errors import ConfigError
from ..plan.calibration.calibration import Calibration
from ..plan.data_view import DataFacts
from ..plan.job import Job
from . import plan_calibrate, plan_data
from .plan_flags import number, resolve, whole_number, with_vocabulary


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A job to plan, the model's name, whose price counts, and what is known beside it (None: not known)."""

    job: Job
    name: str
    service: str
    price: Price | None
    dataset: str
    facts: DataFacts | None
    tokens_per_second_per_gpu: float | None
    calibrations: tuple[Calibration, ...]


def asked(namespace: argparse.Namespace, *, wants_price: bool = True) -> Asked:
    """The question in these flags. Raises ConfigError for what `train` would refuse too, and for what is no number."""
    if namespace.instance is None:
        raise ConfigError("--instance is missing: say on what, for example --instance=p5.48xlarge")
    service = namespace.service or ("sagemaker" if namespace.instance.startswith("ml.") else "ec2")
    resolved, name = resolve(namespace)
    config = resolved.config
    facts = plan_data.facts_of(namespace, dataset=config.data.dataset)
    job = _job(config, namespace, facts)
    return Asked(
        job=job,
        name=name,
        service=service,
        price=price(job.instance, service, prices_file=namespace.prices_file) if wants_price else None,
        dataset=config.data.dataset,
        facts=facts,
        tokens_per_second_per_gpu=None if namespace.hours_at is None else number("hours_at", namespace.hours_at),
        calibrations=plan_calibrate.read_calibrations(namespace.calibrations),
    )


def with_flags(namespace: argparse.Namespace, flags: Mapping[str, Any]) -> argparse.Namespace:
    """The same question with these flags given."""
    return argparse.Namespace(**{**vars(namespace), **{name: str(value) for name, value in flags.items()}})


def job_with(question: Asked, namespace: argparse.Namespace) -> Job:
    """The job of `question` as the flags in `namespace` make it. Raises ConfigError for what they refuse."""
    return _job(resolve(namespace)[0].config, namespace, question.facts)


def _job(config: Config, namespace: argparse.Namespace, facts: DataFacts | None) -> Job:
    return Job(
        model=with_vocabulary(config, ids_of_data=None if facts is None else facts.vocab_size),
        data=config.data,
        parallel=config.parallel,
        adapters=config.adapters,
        learning=config.learning,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=instance(namespace.instance),
        num_nodes=whole_number("nodes", namespace.nodes or "1"),
    )
