"""`hypershard data analyze DATASET`: what is in a data set, and what a plan would make of it."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("analyze", help="what is in a data set, before training on it", allow_abbrev=False)
    parser.add_argument("dataset", metavar="DATASET")
    parser.set_defaults(do=analyze)


def analyze(args: argparse.Namespace) -> int:
    raise NotImplementedError
