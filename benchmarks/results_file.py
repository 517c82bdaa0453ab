"""Where a benchmark's numbers go: one JSON per run with machine, versions, commit and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions the numbers hold for."""
    import torch
    import transformers

    root = Path(__file__).parent
    commit = subprocess.run(
        ("git", "-C", str(root), "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def save(name: str, numbers: dict[str, Any], *, directory: Path | None = None) -> Path:
    """Write `<directory>/<name>.json` and return its path."""
    target = directory or RESULTS
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    path.write_text(json.dumps({**machine(), **numbers}, indent=1) + "\n")
    return path
