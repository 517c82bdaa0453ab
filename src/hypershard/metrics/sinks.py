"""Where numbers go: JSON lines that programs read, TensorBoard for eyes. Written by rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import StorageError
from ..storage import make_directory, readable_errors, write_bytes


class Sink(Protocol):
    """Takes one flat record of numbers per step."""

    def write(self, step: int, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def close(sinks: Iterable[Sink]) -> None:
    """Close all, so that files are whole and the terminal is given back."""
    for sink in sinks:
        sink.close()


class JsonLines:
    """One JSON object per line, appended and flushed at once, so a killed run keeps every whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable_errors(path, "opening"):
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        self.append({"step": step, **record})

    def append(self, record: Mapping[str, Any]) -> None:
        with readable_errors(self.path, "writing"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise StorageError(f"{path}, line {number}: not a JSON object ({error})") from error
    return records


def drop_after(path: Path, step: int) -> None:
    """Forget the records of steps after `step`: a restored run does those steps again."""
    kept = [record for record in read_json_lines(path) if record["step"] <= step]
    if path.exists():
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


class TensorBoard:
    """Every number of a record as one scalar."""

    def __init__(self, directory: Path, *, purge_after: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make_directory(directory)
        # purge_step hides what a previous run wrote for steps that are done again.
        purge_step = None if purge_after is None else purge_after + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
