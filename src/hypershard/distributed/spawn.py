"""Start this node's ranks as child processes and answer for them: `hypershard train` without torchrun.

The parent imports no torch, forwards signals (so a Ctrl-C or SIGTERM becomes a clean save), ends the
others when one rank fails, and returns that rank's exit code.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE_SECONDS = 10.0  # a failed rank's peers notice and report within this, then they are killed
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def num_gpus() -> int:
    """GPUs of this node that CUDA would show, without importing torch: counts NVIDIA's device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def run_ranks(command: Sequence[str], *, num_ranks: int) -> int:
    """Run `command` once per rank on this node; return 0, or the exit code of the first rank that failed."""
    address, port = "127.0.0.1", _free_port()
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        for rank in range(num_ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            children.append(
                # A session of its own: the terminal's Ctrl-C reaches the rank once, through `forward`.
                subprocess.Popen(  # preexec_fn is unsafe beside threads; this process has none
                    command,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,  # noqa: PLW1509
                )
            )
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """0 when all ranks have ended well; else, a moment after the first failure, the exit code that tells the cause."""
    while not any(child.poll() for child in children):
        if all(child.returncode == 0 for child in children):
            return 0
        time.sleep(0.05)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    failures = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode]
    # A rank that lost its peer ends with 1; what the other one ended with is the cause.
    rank, code = min(failures, key=lambda failure: (failure[1] == 1, failure[0]))
    if code < 0:
        print(f"hypershard: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: be killed by the kernel when the parent dies, so that no rank is left behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
