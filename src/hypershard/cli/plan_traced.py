"""`hypershard plan --traced`: the memory verdict of a trace beside the closed form's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..log import logger
from ..plan import bytes as memory
from ..plan.estimate import LEVEL as CLOSED_FORM
from ..plan.estimate import Memory
from ..plan.job import Job
from ..plan.traced import BAND, LEVEL, CannotTrace, Traced, traced_memory
from ..units import format_bytes

HELP = "memory from a trace of the training itself, in some seconds; needs torch installed, but no GPU"
_WORTH_SAYING = 0.15  # a difference of the two levels that is more than their bands explain


def refuse_elsewhere(namespace: argparse.Namespace) -> None:
    """Raises ConfigError where the other flags ask for no plan of one job."""
    for name in ("check", "search", "calibrate"):
        if getattr(namespace, name):
            raise no_use_with(f"--{name}")


def no_use_with(what: str) -> ConfigError:
    return ConfigError(f"--traced looks at the memory of one plan and does nothing with {what}: drop one of the two")


def trace(job: Job) -> Traced | CannotTrace:
    """The trace of `job`, or why there is none, which is said aloud: the closed form's verdict stands then."""
    print("tracing the training without its tensors takes some seconds ...", file=sys.stderr, flush=True)
    try:
        return traced_memory(job, cache_dir=Path(job.data.cache_dir).expanduser() / "traced")
    except CannotTrace as error:
        logger.warning(f"--traced: {error}; the verdict is the closed form's")
        return error


def lines(found: Memory, traced: Traced | CannotTrace | None) -> Iterator[str]:
    """What the trace says, for the page."""
    if traced is None:
        return
    if isinstance(traced, CannotTrace):
        yield f"  not traced: {traced}"
        return
    most = sorted(traced.categories.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in most if num_bytes >= memory.GIB / 100)
    how = "kept from before" if traced.was_kept else f"{traced.seconds:.1f} s"
    fit = traced.fit
    yield f"  traced: {format_bytes(fit.needed_bytes)} of {format_bytes(fit.usable_bytes)}, {fit.verdict}   " + (
        f"[{LEVEL}, +-{BAND:.0%}; {how}]"
    )
    yield f"    {format_bytes(traced.active_bytes)} in use at once, in {traced.peak.name}: {parts}"
    off = found.gpu.needed_bytes / traced.needed_bytes - 1
    if abs(off) > _WORTH_SAYING:
        yield f"    the closed form says {abs(off):.0%} {'more' if off > 0 else 'less'}; the trace is the better one"


def verdict(found: Memory, traced: Traced | CannotTrace | None) -> str:
    """The plan's verdict: with a trace the GPU's part of it is the trace's."""
    if not isinstance(traced, Traced):
        return found.verdict
    return memory.worst_verdict(traced.fit, found.host)


def as_dict(traced: Traced | CannotTrace) -> dict[str, Any]:
    if isinstance(traced, CannotTrace):
        return {"level": CLOSED_FORM, "error": str(traced)}
    return traced.as_dict()
