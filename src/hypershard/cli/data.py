"""`hypershard data VERB`: what is in a data set, and what a run read of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import data_analyze, data_ledger


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypershard data",
        description="Look into data: before a training, and after.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    data_analyze.add_parser(verbs)
    data_ledger.add_parser(verbs)
    return parser


def run(argv: Sequence[str]) -> int:
    """Do what the verb says; 0 when done. DataError and the like are for the caller to show."""
    args = build_parser().parse_args(argv)
    code: int = args.do(args)
    return code
