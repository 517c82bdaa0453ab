"""Flags of training as a SageMaker job's hyperparameters, within the limits of the service.

A hyperparameter is a flag without its hyphens; its value is the flag's text as a JSON string, so that "60" stays a text
whoever reads it (`sagemaker_environment.flags_of`, in the container). What does not fit (too long, too many), and what
lies in files of this machine (--config, a --model that is a path), goes into one run file in S3, read by --config.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.flags import add_settings, parse
from ..config.sources import read_run_file, read_yaml
from ..errors import ConfigError
from ..models.files import model_file
from ..s3.uri import S3Uri

# CreateTrainingJob's; https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html
_MOST_HYPERPARAMETERS = 100
_MOST_CHARACTERS = 2500
_NUM_OURS = 2  # the run file, and restarts


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a job trains: `model` by name, `config` in S3, `filed` from files of this machine, `flags` given as such."""

    model: str | None
    config: str | None
    filed: Mapping[str, Any]
    flags: Mapping[str, str]

    @property
    def settings(self) -> dict[str, str]:
        """Setting -> text, from files of this machine and flags; flags win."""
        return {**{name: str(value) for name, value in self.filed.items() if value is not None}, **self.flags}

    @property
    def words(self) -> list[str]:
        """As arguments of `hypershard train` that name no file of this machine."""
        named = {name: value for name, value in (("model", self.model), ("config", self.config)) if value is not None}
        texts = {name: "null" if value is None else value for name, value in {**self.filed, **self.flags}.items()}
        return [f"--{name}={value}" for name, value in (named | texts).items()]

    def with_settings(self, more: Mapping[str, str]) -> Hyperparameters:
        return dataclasses.replace(self, flags={**self.flags, **more})

    def without_filed(self, names: Collection[str]) -> Hyperparameters:
        """Without values of files that something else goes before."""
        return dataclasses.replace(self, filed={name: one for name, one in self.filed.items() if name not in names})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def decode(train_flags: Sequence[str]) -> Hyperparameters:
    """The arguments of `hypershard train`, with the files of this machine that they name read.

    Raises ConfigError for an unknown flag or a file that cannot be read.
    """
    parser = _Parser(prog="hypershard train", add_help=False, allow_abbrev=False)
    for own in ("model", "config"):
        parser.add_argument(f"--{own}")
    add_settings(parser)
    flags = vars(parse(parser, train_flags, also_known=("model", "config")))
    model, config = flags.pop("model"), flags.pop("config")
    filed: dict[str, Any] = {}
    if config is not None and not config.startswith("s3://"):
        filed, named = read_run_file(Path(config))
        config, model = None, model or named
    if model is not None and ("/" in model or model.endswith((".yaml", ".yml"))):
        if config is not None:
            raise ConfigError(f"--model={model}: the job sees no file of this machine; put its values into {config}")
        filed = {**read_yaml(model_file(model))[0], **filed}
        model = None
    return Hyperparameters(model=model, config=config, filed=filed, flags=flags)


def encode(flags: Hyperparameters, *, home: S3Uri) -> tuple[dict[str, str], dict[str, bytes]]:
    """HyperParameters of the request, and what must be written before: the run file's s3:// URI -> YAML, or nothing.

    It lies below `home` and bears a digest of its content: a second start of a name is refused only after the writing,
    and the first job must still find its own.

    Raises ConfigError where a run file is needed and the flags name one already.
    """
    given = {name: value for name, value in (("model", flags.model), ("config", flags.config)) if value is not None}
    named = {name: json.dumps(value, ensure_ascii=False) for name, value in given.items()}
    direct = named | {name: json.dumps(value, ensure_ascii=False) for name, value in flags.flags.items()}
    long = [name for name, value in direct.items() if len(value) > _MOST_CHARACTERS]
    fits = not long and len(direct) <= _MOST_HYPERPARAMETERS - _NUM_OURS
    if fits and not flags.filed:
        return direct, {}
    if flags.config is not None:
        what = f"--{long[0]} has over {_MOST_CHARACTERS} characters" if long else f"found {len(direct)} flags"
        raise ConfigError(f"{what}, more than a training job takes: put them into the run file --config={flags.config}")
    import yaml

    content = dict(flags.filed) if fits else {**flags.filed, **flags.flags}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode()
    run_file = str(home / f"run-{hashlib.sha256(text).hexdigest()[:12]}.yaml")
    return {**(direct if fits else named), "config": json.dumps(run_file)}, {run_file: text}
