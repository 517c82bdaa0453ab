"""Where a job's file goes: printed, written, or handed to the program that starts jobs on a cluster."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, HypershardError
from ..storage import make_directory, write_bytes


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A cluster's program that starts jobs: `words` and a file's name, or `words` and `for_stdin`."""

    words: tuple[str, ...]
    for_stdin: tuple[str, ...] = ()


def deliver(text: str, starter: Starter, *, dry_run: bool, write: Path | None) -> None:
    """Print the job's file, write it and print how it is started, or start it and print what the starter said.

    ConfigError: no such program here. HypershardError: it refuses the job. StorageError: the file cannot be written.
    """
    if dry_run:
        print(text, end="")
    elif write is not None:
        write_file(write, text)
        print(shlex.join([*starter.words, str(write)]))
    else:
        print(_start(text, starter))


def write_file(path: Path, text: str) -> None:
    """Write a file and the folders it lies in. StorageError."""
    make_directory(path.parent)
    write_bytes(path, text.encode())


def _start(text: str, starter: Starter) -> str:
    name = starter.words[0]
    if shutil.which(name) is None:
        raise ConfigError(f"found no {name} on this machine; --dry_run prints the job's file, --write FILE keeps it")
    command = [*starter.words, *starter.for_stdin]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HypershardError(f"{name} refused the job: {done.stderr.strip()}")
    return done.stdout.strip()
