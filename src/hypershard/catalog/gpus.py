"""GPUs and their published peaks: one dated, sourced row each in gpus.json. Imports no torch."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One GPU. Peaks are dense (no sparsity) in 10^12 FLOP/s; None where the GPU has no such units."""

    name: str
    pattern: str  # regular expression searched in the device's name
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp8_tflops: float | None
    memory_gib: float  # nominal; a process gets 1 to 7 % less
    memory_tb_per_second: float
    source: str
    date: str  # year-month of the last check


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Every row of the catalog."""
    rows = json.loads((Path(__file__).parent / "gpus.json").read_text())["gpus"]
    return tuple(Gpu(**row) for row in rows)


def gpu_by_device_name(name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name` calls `name`; None for one the catalog does not have.

    A MIG slice has no row: it is a part of a GPU, and the whole one's peak would be wrong.
    """
    if " MIG " in name:
        return None
    found = [gpu for gpu in gpus() if re.search(gpu.pattern, name)]
    assert len(found) <= 1, f"{name} matches {[gpu.name for gpu in found]}"
    return found[0] if found else None
