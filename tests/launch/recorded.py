"""Stand-ins for programs of a GPU node, which print what such a node's programs print."""

from __future__ import annotations

from pathlib import Path


def smi(index: int = 0, **changes: str) -> str:
    """One line of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`, of a healthy H100."""
    values = {
        "index": str(index),
        "name": "NVIDIA H100 80GB HBM3",
        "memory.total": "81559",
        "memory.used": "1",
        "corrected": "0",
        "uncorrected": "0",
        "persistence": "Enabled",
        "clocks": "0x0000000000000001",
        "temperature": "31",
        "driver": "570.86.15",
        "mig": "Disabled",
    }
    return ", ".join({**values, **changes}.values())


def program(folder: Path, name: str, script: str) -> None:
    """A stand-in that prints what was recorded."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
