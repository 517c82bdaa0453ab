"""Why a job failed, in the few words that a platform shows: found in the ranks' output, free of secrets."""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT_CHARACTERS = 1024  # of SageMaker's FailureReason; Kubernetes takes 4096
_LINES_KEPT = 2000
_LINE_CHARACTERS = 2000

_OUR_ERROR = re.compile(r"\d\d:\d\d:\d\d E(?: rank \d+)? ")  # log.py's format
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [A-Z](?: rank \d+)? |[WEI]\d{4} |={20}|hypershard: ")
_TRACEBACK = "Traceback (most recent call last)"
_TORCHRUN_FILE = "torch/distributed/run.py"
_TORCHRUN_CODE = re.compile(r"\bexitcode\s*: (-?\d+)\b")  # "failed (exitcode: 1) local_rank: 0", and its last report
_FINAL_CODES = (2, 3)  # a user's error and a diverged training (errors.py): another start would end the same

_SECRETS = (
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "[redacted]"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|glpat-)[A-Za-z0-9_-]{16,}"), "[redacted]"),
    (re.compile(r"(://[^/\s:@]+):[^/\s@]+@"), r"\1:[redacted]@"),
    (re.compile(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+"), r"\1[redacted]"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)?\s*)[^\s'\"]+"), r"\1[redacted]"),
    (
        re.compile(
            r"(?i)((?:secret|password|passwd|api[_-]?key|access[_-]?key|(?:hf|auth|access|session)[_-]?token)"
            r"[\w-]*['\"]?\s*[:=]\s*['\"]?)[^\s'\",]+"
        ),
        r"\1[redacted]",
    ),
)
_SECRET_NAME = re.compile(r"(?i).*(token|secret|password|passwd|credential|api_?key|access_key|private_key).*")


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without what looks like a secret, and without the value of any variable whose name says it holds one."""
    for name, value in environment.items():
        if len(value) >= 8 and _SECRET_NAME.fullmatch(name):  # shorter ones would tear words apart
            text = text.replace(value, "[redacted]")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class Said:
    """What this node's ranks said last: lines to look for a cause in, and the exit codes torchrun reports."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._codes: list[int] = []

    def add(self, line: str) -> None:
        self._codes += [int(code) for code in _TORCHRUN_CODE.findall(line)]
        self.lines.append(line[:_LINE_CHARACTERS])

    def forget(self) -> None:
        """The ranks have been started again: what went wrong before no longer ends the job."""
        self.lines.clear()
        self._codes.clear()

    @property
    def cause_code(self) -> int | None:
        """How the rank ended that began it, negative for a signal; None: torchrun reported none.

        A rank that lost its peer ends with 1, and torchrun ends the others by SIGTERM: neither tells the cause.
        """
        return min(self._codes, key=lambda code: (code == -15, code == 1), default=None)

    @property
    def is_final(self) -> bool:
        """Whether the ranks failed in a way that another start would not mend."""
        return self.cause_code in _FINAL_CODES


def last_error(lines: Sequence[str]) -> str:
    """The error that the output tells of: our first error line with what belongs to it, else a traceback; "": neither.

    Not the last: ranks that lose the one that failed report later. torchrun's own traceback tells nothing.
    """
    for start, line in enumerate(lines):
        match = _OUR_ERROR.match(line)
        if match:
            return "\n".join([line[match.end() :], *_until_next_message(lines, start + 1)])
    for start, line in enumerate(lines):
        if line.startswith(_TRACEBACK):
            block = _until_next_message(lines, start + 1)
            if not any(_TORCHRUN_FILE in row for row in block):
                return "\n".join([line, *block])
    return ""


def _until_next_message(lines: Sequence[str], start: int) -> list[str]:
    found = []
    for line in list(lines)[start:]:
        if _LOG_LINE.match(line):
            break
        found.append(line)
    return found


def shortened(text: str) -> str:
    """At most LIMIT_CHARACTERS of `text`: its first words say what, its last ones (of a traceback) why."""
    text = text.strip()
    if len(text) <= LIMIT_CHARACTERS:
        return text
    head = 200
    return f"{text[:head]}\n…\n{text[head + 3 - LIMIT_CHARACTERS :]}"


def write_failure(path: Path | None, reason: str) -> None:
    """Leave `reason` where the platform reads it. A platform that has no such place is no second error."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shortened(redact(reason)))
