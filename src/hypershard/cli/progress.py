"""A moving bar for work that is measured in bytes, where somebody looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LARGE_BYTES = 256 * 2**20  # less is done before a bar can be read


@contextmanager
def shown_bytes(total_bytes: int, doing: str) -> Iterator[Callable[[int], None]]:
    """A function to be told of every so many bytes done, from any thread; on a terminal a bar shows them."""
    if total_bytes < _LARGE_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
