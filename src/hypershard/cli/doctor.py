"""`hypershard doctor`: what this machine is, what is wrong with it, how to mend it; `--node`: a job's health check."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TextIO

from ..errors import ConfigError
from ..launch.checks_base import Finding, Status
from ..launch.doctor import NODE_SECONDS, as_record, examine, examine_node, host_name, node_place, this_machine

_DESCRIPTION = """\
Look at this machine: what it is (login node, Slurm, HyperPod, SageMaker, Kubernetes), its GPUs, EFA, memory, disks,
software, credentials and clock. Every line says OK, WARN or FAIL, and how to mend what is not well.

--node is the health check of a job's nodes: GPUs against the catalog, errors in the kernel log, and an all-reduce
over all nodes with its bandwidth. It prints one JSON line per node (host, verdict, reason) on standard output, which
`hypershard launch verdict` takes as evidence, and the findings on standard error.
"""
_EXAMPLES = """\
examples:
  hypershard doctor
  hypershard doctor --bucket s3://my-bucket/runs --json
  srun --ntasks-per-node=1 hypershard doctor --node --expect p5.48xlarge > health.jsonl

exit code: 0, or 1 when a line says FAIL
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard doctor",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--expect", metavar="INSTANCE", help="the type this machine should be; default: what it says it is"
    )
    parser.add_argument("--bucket", metavar="URI", help="also ask S3 for this bucket, and compare the clocks")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--node", action="store_true", help="check a node of a job, one task per node")
    parser.add_argument(
        "--nproc_per_node", metavar="N", type=int, help="--node: ranks to start here; default: one per GPU, else 2"
    )
    parser.add_argument(
        "--limit_seconds", metavar="S", type=float, help=f"--node: when to end at the latest; default: {NODE_SECONDS:g}"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the findings; 0 when all is well enough, 1 when a line says FAIL. Raises ConfigError."""
    args = build_parser().parse_args(argv)
    if args.node:
        return _node(args)
    for flag in ("nproc_per_node", "limit_seconds"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag}: acts with --node only; add --node or leave it out")
    findings = examine(this_machine(expect=args.expect, bucket=args.bucket))
    failed = any(finding.status is Status.FAIL for finding in findings)
    if args.json:
        print(json.dumps({"host": host_name(), "findings": [as_record(finding) for finding in findings]}, indent=1))
    else:
        _show(findings, sys.stdout)
        if failed:
            print("not fit to train as it is: see the lines that say FAIL")
    return int(failed)


def _node(args: argparse.Namespace) -> int:
    if args.bucket is not None:
        raise ConfigError(
            f"--bucket={args.bucket}: not looked at by --node; run `hypershard doctor --bucket` without it"
        )
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise ConfigError(f"--nproc_per_node={args.nproc_per_node}: expected at least 1")
    limit_seconds = NODE_SECONDS if args.limit_seconds is None else args.limit_seconds
    if not limit_seconds > 0:
        raise ConfigError(f"--limit_seconds={limit_seconds:g}: expected seconds above 0")
    machine = this_machine(expect=args.expect, must_train=True)
    report = examine_node(machine, node_place(), nproc_per_node=args.nproc_per_node, limit_seconds=limit_seconds)
    line = report.evidence()
    if args.json:
        line["findings"] = [as_record(finding) for finding in report.findings]
    else:
        _show(report.findings, sys.stderr)
    print(json.dumps(line), flush=True)
    return int(report.failed)


def _show(findings: Sequence[Finding], file: TextIO) -> None:
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        print(f"{finding.status:<4}  {finding.name:<{width}}  {finding.found}", file=file)
        if finding.fix and finding.status is not Status.OK:
            print(f"{'':4}  {'':<{width}}  -> {finding.fix}", file=file)
