"""The run on rank 0's terminal: a live line where there is a terminal, plain lines where there is a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from ..units import format_bytes, format_count, format_seconds

_DATA_SHARE_SHOWN = 0.05  # of a step's time; below it nobody need care


class Display:
    """A sink for eyes. On a terminal one line is rewritten in place; elsewhere at most one line a second is printed."""

    def __init__(self, *, last_step: int, first_step: int) -> None:
        self._last_step = last_step
        self._live = _LiveLine(last_step, first_step) if sys.stdout.isatty() else None
        self._printed_at = 0.0

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        self._last_step = record.get("last_step", self._last_step)  # a run in a window may end sooner than it began
        line = describe(step, self._last_step, record)
        if "validation_loss" in record:
            self._print(line)
        elif self._live is not None:
            self._live.update(step, self._last_step, line)
        elif step == self._last_step or time.monotonic() - self._printed_at >= 1.0:
            self._print(line)
            self._printed_at = time.monotonic()

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.print(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.close()


class _LiveLine:
    """A progress bar with the newest numbers beside it."""

    def __init__(self, last_step: int, first_step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._progress.start()
        self._task = self._progress.add_task("starting", total=last_step, completed=first_step)

    def update(self, step: int, last_step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, total=last_step, description=line)

    def print(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def describe(step: int, last_step: int, record: Mapping[str, Any]) -> str:
    """One line for a person: `step 12/60  loss 5.1234  norm 1.21  lr 3.0e-04  12.3k tok/s  1.20 GiB  eta 42s`."""
    parts = [f"step {step}/{last_step}"]
    if "validation_loss" in record:
        parts.append(f"validation loss {record['validation_loss']:.4f}")
        if "validation_preference_accuracy" in record:
            parts.append(f"accuracy {record['validation_preference_accuracy']:.1%}")
        return "  ".join(parts)
    parts += [f"loss {record['loss']:.4f}", f"norm {record['grad_norm']:.2f}", f"lr {record['lr']:.1e}"]
    if "preference_accuracy" in record:
        parts.append(f"accuracy {record['preference_accuracy']:.1%}")
    parts.append(f"{format_count(record['tokens_per_second'])} tok/s")
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    if record["data_seconds"] > _DATA_SHARE_SHOWN * record["step_seconds"]:
        parts.append(f"waits for data {record['data_seconds'] / record['step_seconds']:.0%}")
    parts += [
        format_bytes(record["memory_bytes"]),
        f"eta {format_seconds(_seconds_left(step, last_step, record))}",
        *_plan_parts(record),
    ]
    return "  ".join(parts)


def _seconds_left(step: int, last_step: int, record: Mapping[str, Any]) -> float:
    """At the pace of the last steps; by this one alone where the record tells none."""
    hours: float | None = record.get("training/remaining_hours")
    return (last_step - step) * record["step_seconds"] if hours is None else hours * 3600


def _plan_parts(record: Mapping[str, Any]) -> list[str]:
    """`elapsed 1m10s  1.2k steps/h  on track 98%  $3.10 + $8.20 to come`: planned over expected time, and dollars."""
    parts = []
    if (elapsed := record.get("training/elapsed_hours")) is not None:
        parts.append(f"elapsed {format_seconds(elapsed * 3600)}")
    if (pace := record.get("training/steps_per_hour")) is not None:
        parts.append(f"{format_count(pace)} steps/h")
    if (accuracy := record.get("optimization/time_accuracy")) is not None:
        off = "slower than planned" if accuracy < 1 else "faster than planned"
        parts.append(f"{'on track' if record['training/on_track'] else off} {accuracy:.0%}")
    if (spent := record.get("training/dollars_spent")) is not None:
        to_come = record.get("training/dollars_to_come")
        parts.append(f"${spent:,.2f}" if to_come is None else f"${spent:,.2f} + ${to_come:,.2f} to come")
    return parts
