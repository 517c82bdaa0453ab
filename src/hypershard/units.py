"""Quantities as people write and read them: counts, bytes, seconds, FLOPs."""

from __future__ import annotations

_COUNT_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_count(number: float) -> str:
    """`1235814400 -> '1.236B'`: three decimals at most, the way model sizes and token counts are read."""
    for step, suffix in _COUNT_STEPS:
        if abs(number) >= step:
            return f"{number / step:.4g}{suffix}"
    return f"{number:.4g}"


def format_bytes(number: float) -> str:
    """Binary units: `3221225472 -> '3.00 GiB'`."""
    for step, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= step:
            return f"{number / step:.2f} {suffix}"
    return f"{number:.0f} B"


def format_seconds(seconds: float) -> str:
    """`3725 -> '1h02m'`, `42 -> '42s'`: two units at most, for progress lines."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    if seconds < 86400:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    return f"{int(seconds // 86400)}d{int(seconds % 86400 // 3600):02d}h"


def quoted(text: str, *, most: int, at_start: bool = False) -> str:
    """At most `most` characters of anybody's text, in quotes, with an ellipsis where some are left out: at its end or
    its start. What a terminal would act on, line breaks too, is escaped as in Python."""
    if len(text) > most:
        text = f"…{text[len(text) - most + 1 :]}" if at_start else f"{text[: most - 1]}…"
    return repr(text)
