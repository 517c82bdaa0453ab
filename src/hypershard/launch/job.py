"""A training job as one value: what runs, on what, for how long. Each launcher prints it in its own language.

Nothing here knows Slurm, SageMaker or Kubernetes, and nothing there knows a default of training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")  # what SageMaker and Kubernetes both take
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each of `num_nodes` equal nodes has. `instance_type` as AWS names it, without ml.: p5.48xlarge."""

    instance_type: str
    num_nodes: int
    gpus_per_node: int
    efa_interfaces: int

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job.

    `train_flags`: the arguments of `hypershard train`, word for word. `environment`: variables every rank gets.
    `run_dir`: where all nodes see the run directory. `hours`: after which the cluster may end the job. `max_restarts`:
    starts without any progress before it is given up. `image`: a container image, or None to run in what is installed.
    """

    name: str
    train_flags: tuple[str, ...]
    environment: Mapping[str, str]
    resources: Resources
    run_dir: str
    hours: float
    max_restarts: int
    image: str | None

    def __post_init__(self) -> None:
        """Raises ConfigError for what no launcher could print safely."""
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"--run_name={self.name}: expected letters, digits and hyphens, at most 63, none of them at an end"
            )
        for variable, value in self.environment.items():
            if not _VARIABLE.fullmatch(variable) or "\0" in value or "\n" in value:
                raise ConfigError(f"environment variable {variable!r}: found a name or value that no shell can set")
        for flag in self.train_flags:
            if "\0" in flag or "\n" in flag:
                raise ConfigError(f"{flag.splitlines()[0]!r}: found a line break in a flag")
