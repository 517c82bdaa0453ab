"""The README.md of an exported model: what its training's own records say, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from .. import __version__
from ..units import format_count

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{model_type} with {parameters} parameters in {dtype}: {origin} with hypershard {version}.

| | |
|---|---|
"""
_TAIL = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Licence: not stated here. The weights that the training started from and its data have theirs; add what they allow.
"""


@dataclass(frozen=True)
class Training:
    """What is known of a training up to `step`, None where there was none. `facts` are the checkpoint's; the others lie
    beside it, {} or [] where they do not.

    `config`: config.yaml; `environment`: environment.json; `metrics`: lines of metrics.jsonl.
    """

    step: int | None
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: list[dict[str, Any]]


def model_card(
    training: Training, *, name: str, num_parameters: int, dtype: str, merged: Sequence[tuple[str, float]]
) -> str:
    """The card's text. The same for the same checkpoint, however far the run has gone on since.

    `merged`: the adapters that were worked in besides the training's own, and how many times each counts.
    """
    facts = training.facts
    head = _HEAD.format(
        name=name,
        model_type=facts["model"]["model_type"],
        parameters=format_count(num_parameters),
        dtype=dtype,
        origin="adapters merged into a model" if training.step is None else f"step {training.step} of a training",
        version=__version__,
    )
    rows = "".join(f"| {label} | {value} |\n" for label, value in _rows(training))
    rows += "".join(f"| adapter merged in | {_place(location)}, {weight:g} times |\n" for location, weight in merged)
    return head + rows + _TAIL.format(name=name)


def _rows(training: Training) -> Iterator[tuple[str, str]]:
    facts, config, environment = training.facts, training.config, training.environment
    if "init_from" in config:
        yield "started from", "random weights" if config["init_from"] == "scratch" else _place(config["init_from"])
    if "dataset" in config:
        yield "data", _place(config["dataset"])
    if "tokens" in facts:
        yield "tokens seen", f"{facts['tokens']:,}"
    if "samples_per_step" in facts:
        yield "a step", f"{facts['samples_per_step']} sequences of {facts['model']['max_context_width']} tokens"
    for label, key in (("training loss", "loss"), ("validation loss", "validation_loss")):
        found = [record for record in training.metrics if key in record and record["step"] <= (training.step or 0)]
        if found:
            yield label, f"{found[-1][key]:.4f} nats per token at step {found[-1]['step']}"
    if "world_size" in environment:
        yield "hardware", f"{environment['world_size']} x {environment['device']}"
    versions = [f"{library} {environment[library]}" for library in ("torch", "transformers") if library in environment]
    if versions:
        yield "libraries", ", ".join(versions)


def _place(text: str) -> str:
    """A name or URI as given; of a path on some machine only its end."""
    return f"`{PurePath(text).name if PurePath(text).is_absolute() else text}`"


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that may be being written: its whole lines."""
    return [json.loads(line) for line in content.decode().splitlines(keepends=True) if line.endswith("\n")]
