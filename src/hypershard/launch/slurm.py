"""A job as an sbatch file: one template for all, with what differs filled in.

What the file does, and why, stands in its own comments: templates/job.sbatch.
"""

from __future__ import annotations

import math
import re
import shlex
import string
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..catalog.instances import families, instances
from ..errors import ConfigError
from .environment import REASONS, environment_for
from .job import Job

CPU_NODES = "cpu"  # INSTANCE where nodes have no GPUs
_SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # set by SAVE_SECONDS
_NOTICE_SECONDS = 60  # Slurm looks for jobs near their end every 30 s, and came 28 s late when measured
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:&|*\[\]-]*")  # partitions, accounts, constraints: nothing a line ends at


class _Template(string.Template):
    delimiter = "@@"  # $ is the shell's


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What only Slurm needs to know of a job.

    `file`: under which name people submit it. `directives`: partition, account and the like, by sbatch's names.
    `counts_gpus`: whether the cluster has GPUs as GRES, to be asked for. `save_seconds`: the longest a last save may
    take. `mounts`: `/from:/to,...` for the job's image.
    """

    file: str = "job.sbatch"
    directives: tuple[tuple[str, str], ...] = ()
    counts_gpus: bool = True
    save_seconds: int = 300
    venv: str = ""
    mounts: str = ""


def render(job: Job, options: SlurmOptions) -> str:
    """The sbatch file. In `job.run_dir`, %x and %j are the job's name and number, as in Slurm's file names.

    Raises ConfigError for values that no #SBATCH line can hold.
    """
    _check(job, options)
    resources = job.resources
    instance = resources.instance_type or CPU_NODES
    model = next((flag.partition("=")[2] for flag in job.train_flags if flag.startswith("--model=")), job.name)
    what = f"{resources.num_nodes} x {resources.instance_type or 'a node without GPUs'}"
    template = Path(__file__).with_name("templates") / "job.sbatch"
    return _Template(template.read_text()).substitute(
        title=f"Train {model} on {what}.",
        file=shlex.quote(options.file),
        other="p4d.24xlarge" if instance != "p4d.24xlarge" else "p5.48xlarge",
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(job, options)),
        instance=instance,
        run_dir=_path(job.run_dir),
        venv=_quoted(options.venv),
        image=_quoted(job.image or ""),
        mounts=_quoted(options.mounts),
        save_seconds=options.save_seconds,
        max_restarts=job.max_restarts,
        health_check=int(resources.gpus_per_node > 0),
        flags="\n".join(f"    {shlex.quote(flag)}" for flag in _flags(job)),
        instance_cases="\n".join(_cases(job)),
        environment="\n".join(_exports(job)),
    )


def _check(job: Job, options: SlurmOptions) -> None:
    if not options.file.isprintable():
        raise ConfigError(f"--write={options.file!r}: expected a name that can stand in one line")
    given, usual = (env.get(_SHUTDOWN) for env in (job.environment, environment_for(None, run_dir=job.run_dir)))
    if given not in (None, usual):
        raise ConfigError(f"--environment {_SHUTDOWN}={given}: on Slurm --save_seconds says this; leave it out")
    if options.save_seconds < 1:
        raise ConfigError(f"--save_seconds={options.save_seconds}: expected at least 1")


def _directives(job: Job, options: SlurmOptions) -> list[str]:
    lines = [
        f"job-name={job.name}",
        f"nodes={job.resources.num_nodes}",
        "ntasks-per-node=1",
        "exclusive",
        "mem=0",
    ]
    if job.resources.gpus_per_node and options.counts_gpus:
        lines.append(f"gpus-per-node={job.resources.gpus_per_node}")
    lines += [
        f"time={_time(job.hours)}",
        "output=%x-%j.out",
        "open-mode=append",
        "requeue",
        f"signal=B:USR1@{options.save_seconds + _NOTICE_SECONDS}",
    ]
    for name, value in options.directives:
        if not _WORD.fullmatch(value):
            raise ConfigError(f"--{name}={value}: found characters that no #SBATCH line can hold")
        lines.append(f"{name}={value}")
    return lines


def _time(hours: float) -> str:
    """`13.5 -> 0-13:30:00`, rounded up to minutes, in which Slurm counts."""
    minutes = math.ceil(hours * 60)
    return f"{minutes // 1440}-{minutes % 1440 // 60:02d}:{minutes % 60:02d}:00"


def _flags(job: Job) -> list[str]:
    """The job's flags but --run_dir, which the script makes of RUN_DIR."""
    return [flag for flag in job.train_flags if not flag.startswith("--run_dir=")]


def _quoted(text: str) -> str:
    """`text` as the default inside ${NAME:-...}."""
    return shlex.quote(text) if text else ""


def _path(run_dir: str) -> str:
    """A run directory for the shell, with Slurm's %x and %j as variables."""
    variables = {"%x": '"$SLURM_JOB_NAME"', "%j": '"$SLURM_JOB_ID"'}
    return "".join(variables.get(part) or _quoted(part) for part in re.split(r"(%[xj])", run_dir))


def _exports(job: Job) -> list[str]:
    """The job's environment, without what the table of instances sets."""
    tabled = _tabled(job)
    folder = job.run_dir.rstrip("/")
    lines = []
    for name, value in job.environment.items():
        if name in tabled or name == _SHUTDOWN:
            continue
        text = f'"$RUN_DIR"{_quoted(value.removeprefix(folder))}' if value.startswith(f"{folder}/") else _quoted(value)
        lines += [f"# {REASONS[name]}"] if name in REASONS else []
        lines.append(f"default {name}={text}")
    return lines


def _tabled(job: Job) -> set[str]:
    """Variables that differ between instances, and that the job has as its instance wants them."""
    by_instance = {row.name: environment_for(row, run_dir=job.run_dir) for row in instances()}
    every = [dict(environment_for(None, run_dir=job.run_dir)), *by_instance.values()]
    names = {name for one in every for name in one if any(one[name] != other.get(name) for other in every)}
    own = by_instance.get(job.resources.instance_type, every[0])
    return {name for name in names if job.environment.get(name) == own.get(name)}


def _cases(job: Job) -> list[str]:
    """One arm of the shell's `case` for all instances that need the same."""
    tabled = _tabled(job)
    words = {kind: word for word, kind in families().items()}
    alike: dict[tuple[int, tuple[str, ...]], list[str]] = defaultdict(list)
    for row in instances():
        environment = environment_for(row, run_dir=job.run_dir)
        needs = tuple(f"{name}={_quoted(environment[name])}" for name in sorted(tabled) if name in environment)
        alike[row.num_gpus, needs] += [row.name, *([words[row.name]] if row.name in words else [])]
    lines = [f"{CPU_NODES}) ranks=1 ;;"]
    for (num_gpus, needs), names in alike.items():
        default = f" && default {' '.join(needs)}" if needs else ""
        lines.append(f"{' | '.join(names)})\n    ranks=${{SLURM_GPUS_ON_NODE:-{num_gpus}}}{default} ;;")
    return lines
