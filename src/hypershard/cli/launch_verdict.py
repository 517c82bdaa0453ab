"""`hypershard launch verdict RUN`: what a job script does next, from the run's record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..launch.verdict import TOLD, judge, read_events, summarise, unwell

_DESCRIPTION = """\
Say what to do with a job whose ranks have ended, or whether it may start them. One line: the action, the nodes to
replace (name=Remedy,... or -), and the reason. Job scripts act on it; a person may ask too. Nothing is changed.

actions: start (go on, in this allocation), done, stopped (by a person), requeue, replace (requeue, and have nodes
replaced), give_up
"""
_EXAMPLES = """\
examples:
  hypershard launch verdict runs/demo --exit_code 1
  hypershard launch verdict runs/demo --exit_code 1 --job 1234 --node_states "$(sinfo -hN -n "$nodes" -o '%N %T')"
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "verdict",
        help="what a job script does next, from the run's record",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run directory")
    parser.add_argument("--exit_code", type=int, metavar="N", help="of the ranks' launcher; default: none was started")
    parser.add_argument("--told", choices=TOLD, help="why the job was asked to stop; default: it was not")
    parser.add_argument("--job", metavar="ID", help="count the launches of this job alone; default: of all")
    parser.add_argument(
        "--max_restarts", type=int, default=3, metavar="N", help="launches without a newer step before it is given up"
    )
    parser.add_argument("--node_states", default="", metavar="TEXT", help="lines `node state` of the job's nodes")
    parser.add_argument(
        "--health", type=Path, metavar="FILE", help="what `hypershard doctor --node` printed on the job's nodes"
    )
    parser.set_defaults(do=verdict)


def verdict(args: argparse.Namespace) -> int:
    """Print the verdict. Raises ConfigError for a missing folder or file, StorageError for an unreadable one."""
    if not args.run_dir.is_dir():
        raise ConfigError(f"{args.run_dir}: there is no such folder; expected a run directory")
    if args.health is not None and not args.health.is_file():
        raise ConfigError(f"--health={args.health}: there is no such file")
    nodes = unwell(
        args.node_states,
        args.health.read_text(errors="replace") if args.health is not None else "",
        among=[line.split()[0] for line in args.node_states.splitlines() if line.strip()] or None,
    )
    record = summarise(read_events(args.run_dir / "events.jsonl"), job=args.job)
    found = judge(record, exit_code=args.exit_code, told=args.told, max_restarts=args.max_restarts, nodes=nodes)
    print(found.line())
    return 0
