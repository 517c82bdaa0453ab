"""`hypershard report RUN`: a run's curve, speed and whereabouts on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..report.read import read_run
from ..report.terminal import render


def run(argv: Sequence[str]) -> int:
    """Print the run's summary. Raises DataError when the folder holds no run."""
    parser = argparse.ArgumentParser(prog="hypershard report", description="Show a run directory on the terminal.")
    parser.add_argument("run_dir", type=Path, help="the run directory, as printed by `hypershard train`")
    print(render(read_run(parser.parse_args(argv).run_dir)))
    return 0
