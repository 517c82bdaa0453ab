"""What one check of a machine says, and how checks are kept from hanging.

A machine that is ill often does not answer: nvidia-smi waits for a lost GPU, statfs for a lost file server. So programs
are asked with a limit and left behind when they do not even die, and each check runs in a thread that is given up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ..catalog.instances import Instance

_PROGRAM_SECONDS = 10.0  # nvidia-smi takes 2 to 5 s on eight GPUs without persistence mode


class Status(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


class Remedy(StrEnum):
    """What a finding proves about its node; anything but `ok` only where the node itself shows the evidence."""

    NONE = "ok"
    REBOOT = "reboot"
    REPLACE = "replace"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, and how to mend it where it is not well."""

    name: str
    status: Status
    found: str
    fix: str = ""
    remedy: Remedy = Remedy.NONE


def ok(name: str, found: str) -> Finding:
    return Finding(name, Status.OK, found)


def warn(name: str, found: str, fix: str) -> Finding:
    return Finding(name, Status.WARN, found, fix)


def fail(name: str, found: str, fix: str, remedy: Remedy = Remedy.NONE) -> Finding:
    return Finding(name, Status.FAIL, found, fix, remedy)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is examined. `instance` is its catalog row, None where the type is unknown; `root` holds /sys, /proc, /opt.

    `must_train` says that a job is to run here, so that what only a training needs is a failure when it is missing.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    instance: Instance | None = None
    must_train: bool = False
    bucket: str | None = None

    def file(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """Text of a small file, stripped; "" when it is not there or not ours to read."""
        try:
            return self.file(path).read_text(errors="replace").strip()
        except OSError:
            return ""


@dataclass(frozen=True)
class Answer:
    """What a program printed. `trouble` says why there is no answer; "" when it ended with 0."""

    text: str
    trouble: str = ""


def ask(machine: Machine, argv: Sequence[str], *, limit_seconds: float = _PROGRAM_SECONDS) -> Answer:
    """Run a program of this machine's PATH. Never raises, never waits longer than the limit and a second."""
    program = shutil.which(argv[0], path=machine.environment.get("PATH"))
    if program is None:
        return Answer("", f"{argv[0]} is not installed")
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            env=dict(machine.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Answer("", f"{argv[0]} cannot be started: {error.strerror}")
    try:
        text, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        _leave(process)
        return Answer("", f"{argv[0]} gave no answer within {limit_seconds:g} s")
    if process.returncode:
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
        said = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        return Answer(text, f"{argv[0]} ended with {process.returncode} and said: {said[:200]}")
    return Answer(text)


def _leave(process: subprocess.Popen[str]) -> None:
    """Kill what can be killed. A process that waits for a lost device cannot: it is left, not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)


@dataclass(frozen=True)
class Check:
    """A check with its name, and the seconds after which it is given up."""

    name: str
    examine: Callable[[Machine], list[Finding]]
    limit_seconds: float = 15.0


def run_checks(checks: Sequence[Check], machine: Machine) -> list[Finding]:
    """All findings, in the order of the checks, which run side by side; done when the longest limit has passed."""
    found: dict[str, list[Finding]] = {}

    def run(check: Check) -> None:
        try:
            found[check.name] = check.examine(machine)
        except Exception as error:  # one check that breaks must not take the others with it
            said = f"this check broke: {type(error).__name__}: {error}"
            found[check.name] = [warn(check.name, said[:300], "tell who maintains this program")]

    started = time.monotonic()
    threads = [threading.Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    findings = []
    for check, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, started + check.limit_seconds - time.monotonic()))
        late = warn(
            check.name,
            f"no answer within {check.limit_seconds:g} s",
            "look at the disk, driver or network that it asks",
        )
        findings += found.get(check.name, [late])
    return findings


def version_of(text: str) -> tuple[int, ...]:
    """`2.4.0amzn5.0 -> (2, 4, 0)`: the leading numbers of a version; () when there are none."""
    numbers = []
    for part in text.strip().lstrip("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
