"""`hypershard launch local`: the job that a cluster would get, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from ..launch.build import build_job
from ..launch.environment import REASONS
from ..launch.job import Job
from ..launch.start import local_command, run_here
from ..log import setup_logging

_DESCRIPTION = """\
Run a job on this machine: the flags, environment and supervisor that it would have in a container on a cluster, with
one rank per GPU or one in all. It goes on from the newest checkpoint in --run_dir. Flags that are not listed here are
flags of `hypershard train`, --config FILE (a run file) among them.
"""
_EXAMPLES = """\
examples:
  hypershard launch local --model tiny_llama --run_dir runs/first --max_steps=60
  hypershard launch local --model llama3_8b --instance p5 --run_dir /fsx/runs/one --max_restarts 3 --train_batch_size=2
"""
_NO_LIMIT_HOURS = 24.0 * 365  # nothing here ends a job by the clock; --max_hours does


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "local",
        help="run the same job on this machine",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help="model file, as of `hypershard train`")
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--instance", metavar="TYPE", help="what this machine is (p5); default: none of the catalog")
    parser.add_argument("--nproc_per_node", type=int, metavar="N", help="ranks; default: one per GPU, or one")
    parser.add_argument(
        "--max_restarts", type=int, default=0, metavar="N", help="how often failed ranks are started again (default: 0)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the command and its environment, start nothing")
    parser.set_defaults(do=local, takes_train_flags=True, train_flags=[])


def local(args: argparse.Namespace) -> int:
    """Run the job, or print it. Returns its exit code; raises ConfigError for wrong flags."""
    job = build_job(
        train_flags=args.train_flags,
        model_name=args.model,
        instance=args.instance,
        num_nodes=1,
        run_dir=args.run_dir,
        hours=_NO_LIMIT_HOURS,
        image=None,
        max_restarts=args.max_restarts,
        name=None,
        extra_environment={},
    )
    if args.nproc_per_node is not None:
        job = dataclasses.replace(job, resources=dataclasses.replace(job.resources, gpus_per_node=args.nproc_per_node))
    if args.dry_run:
        print(_as_text(job), end="")
        return 0
    setup_logging()
    return run_here(job)


def _as_text(job: Job) -> str:
    lines = [f"export {name}={shlex.quote(value)}  # {REASONS[name]}" for name, value in job.environment.items()]
    return "\n".join([*lines, shlex.join(local_command(job))]) + "\n"
