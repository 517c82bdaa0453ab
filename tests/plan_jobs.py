"""Jobs for the planner's tests: a model file with flags, on an instance."""

from __future__ import annotations

from typing import Any

from hypershard.catalog.instances import instance
from hypershard.config.schema import Config
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.data.embedded import VOCAB_SIZE
from hypershard.models.family import family_of
from hypershard.models.files import model_file
from hypershard.plan.job import Job


def config_of(model: str, **flags: Any) -> Config:
    """A model file under flags; an open vocabulary is the embedded tokenizer's."""
    values = read_yaml(model_file(model))[0]
    open_vocabulary = {} if "vocab_size" in values else {"vocab_size": VOCAB_SIZE}
    layers = (Layer("model file", {**open_vocabulary, **values}), Layer("flag", flags, is_flags=True))
    return resolve(*layers).config


def job_of(model: str, where: str = "p5", num_nodes: int = 1, **flags: Any) -> Job:
    config = config_of(model, **flags)
    return Job(
        model=family_of(config.model.model_type).complete(config.model),
        data=config.data,
        parallel=config.parallel,
        adapters=config.adapters,
        learning=config.learning,
        checkpoint=config.checkpoint,
        train=config.train,
        instance=instance(where),
        num_nodes=num_nodes,
    )
