"""The flags of `hypershard plan` that say how large the data set is, and what the page says of it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import ConfigError
from ..plan.data_view import DataFacts, DataView, analysed_facts, bins_facts, data_view, told_facts, view_lines
from ..plan.job import Job
from .plan_flags import number, whole_number

EMBEDDED = "embedded"
OWN = ("num_samples", "tokens_per_sample", "dataset_tokens", "dataset_facts")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Without them token bins named by --dataset tell their sizes themselves."""
    parser.add_argument("--num_samples", metavar="N", help="documents or conversations to fine-tune on")
    parser.add_argument("--tokens_per_sample", metavar="X", help="tokens of one of them on average")
    parser.add_argument("--dataset_tokens", metavar="N", help="tokens of one pass over the data, for --epochs")
    parser.add_argument(
        "--dataset_facts", metavar="FILE", type=Path, help="what `hypershard data analyze DATASET --json` printed"
    )


def facts_of(namespace: argparse.Namespace, *, dataset: str) -> DataFacts | None:
    """What is known of the data; None: nothing. Nothing of it is read. Raises ConfigError, or DataError of bins."""
    samples, mean, tokens = namespace.num_samples, namespace.tokens_per_sample, namespace.dataset_tokens
    told = told_facts(
        num_samples=None if samples is None else whole_number("num_samples", samples),
        tokens_per_sample=None if mean is None else number("tokens_per_sample", mean),
        dataset_tokens=None if tokens is None else whole_number("dataset_tokens", tokens),
    )
    if namespace.dataset_facts is None:
        return told if told.source else bins_facts(dataset)
    if told.source:
        raise ConfigError(f"--dataset_facts={namespace.dataset_facts} says that, and so does {told.source}; drop one")
    return analysed_facts(namespace.dataset_facts)


def view_of(facts: DataFacts | None, job: Job, *, num_steps: int | None) -> DataView | None:
    """How `num_steps` of `job` use the data; None where nothing is known of them."""
    if facts is None:
        return None
    return data_view(
        facts,
        num_steps=num_steps,
        samples_per_step=job.step_tokens // job.model.max_context_width,
        context_tokens=job.model.max_context_width,
        packing=job.data.packing,
    )


def data_lines(view: DataView | None, *, dataset: str) -> list[str]:
    """What the page says of the data, or how to count them where they are named and not known."""
    if view is not None:
        return view_lines(view)
    if dataset == EMBEDDED:
        return []
    return [
        f"data     not read here; `hypershard data analyze {shlex.quote(dataset)} --json > facts.json` counts it for "
        f"--dataset_facts=facts.json"
    ]
