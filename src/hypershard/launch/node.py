"""The supervisor of one node: process 1 of a container, what `srun` starts, or `hypershard launch local`.

    wait for the other nodes ──> torchrun ──> ranks
                                    │
    SIGTERM, SIGINT, SIGUSR1 ──> to the ranks themselves, on all nodes: they save and end      SIGUSR2: they only save
    a node is lost           ──> the ranks here get GRACE_SECONDS to say so, then they are killed
    an orphan ends           ──> collected, as process 1 must

Signals go past torchrun's agent, which would end the ranks 30 s after a SIGTERM, report a clean stop as a failure, and
end itself by SIGUSR1 and SIGUSR2. No shell and no torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..log import logger
from .failure import Said, last_error, redact, shortened
from .hosts import Stopped, Wait, address_of
from .links import Links, Note, open_links
from .surroundings import NodePlace

TORCHRUN = "torch.distributed.run"
_FINAL_SECONDS = 3.0  # the same where the error is the user's, so all ranks have it
_NEWS_SECONDS = 3.0  # a node whose ranks do not know why they failed hears it from another within this
GRACE_SECONDS = 15.0  # a rank that lost its peer reports it within this, where the network tells it
_TICK_SECONDS = 0.2
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class Ending:
    """How this node's program ended: the exit code for the platform, and the error that explains a failure."""

    code: int
    error: str = ""


class Supervisor:
    """Runs one program, torchrun or a verb, and answers for it until it has ended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], place: NodePlace):
        self._command, self._environment, self._place = list(command), dict(environment), place
        self._asked: deque[int] = deque()
        self._stop: str | None = None  # the signal that asked to stop, here or on another node
        self._ranks: set[int] = set()
        self._signalled: set[int] = set()
        self._lost: Note | None = None
        self._kill_at: float | None = None
        self._said = Said()
        self._links = Links(place, [])
        self._child: subprocess.Popen[bytes] | None = None
        for number in (*_STOPS, signal.SIGUSR2):  # at once: process 1 gets no signal that it has no handler for
            signal.signal(number, self._remember)

    def run(self, *, start_seconds: float) -> Ending:
        """Wait for the other nodes, then for the program's end. Raises HypershardError for nodes that do not come."""
        try:
            wait = Wait(start_seconds, is_stopped=lambda: bool(set(self._asked) & set(_STOPS)))
            address_of(self._place.host, wait=wait)  # what torchrun tells the others must be known here too
            self._links = open_links(self._place, wait=wait)
        except Stopped:
            logger.info("asked to stop before anything was started")
            return Ending(self._place.clean_stop_code)
        interface = self._links.interface()
        if interface is not None:  # gloo takes the host name's address, which may be a loopback one
            self._environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            code = self._watch()
            ending = self._ending(code)
            self._links.tell("ended", ending.error, code=ending.code)
            return ending
        finally:
            self._links.close()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._asked.append(number)

    def _watch(self) -> int:
        """Start the program and pass on what it says and is told, until it ends. Returns how: negative for a signal."""
        child = self._child = subprocess.Popen(  # preexec_fn is unsafe beside threads; this process has none
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the ranks once, through this process
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        )
        assert child.stdout is not None and child.stderr is not None
        with selectors.DefaultSelector() as selector:
            for pipe, target in ((child.stdout, 1), (child.stderr, 2)):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, _Passage(target, self._said))
            for link in self._links.sockets():
                selector.register(link, selectors.EVENT_READ)
            status: int | None = None
            while status is None:
                self._serve(selector, _TICK_SECONDS)
                self._pass_on_signals()
                self._end_what_cannot_go_on()
                status = _collect(child.pid)
            child.returncode = status
            self._serve(selector, 0.0)  # what was said last; an orphan may hold the pipe open, so its end is no sign
            until = time.monotonic() + _NEWS_SECONDS
            while status and not self._knows_why() and self._links.sockets() and time.monotonic() < until:
                self._serve(selector, _TICK_SECONDS)
        return status

    def _knows_why(self) -> bool:
        return bool(self._stop or self._lost or last_error(self._said.lines))

    def _serve(self, selector: selectors.BaseSelector, seconds: float) -> None:
        for key, _ in selector.select(seconds):
            if isinstance(key.data, _Passage):
                if not key.data.pass_on(key.fd):
                    selector.unregister(key.fileobj)
                continue
            notes = self._links.read(key.fileobj)  # type: ignore[arg-type]
            if key.fileobj not in self._links.sockets():
                selector.unregister(key.fileobj)
            for note in notes:
                self._hear(note)

    def _hear(self, note: Note) -> None:
        if note.kind == "stop" and self._stop is None:
            logger.info(f"{note.host} was sent {note.text}: stopping here too")
            self._stop = note.text
        is_loss = note.kind == "lost" or (note.kind == "ended" and note.code not in (0, self._place.clean_stop_code))
        if is_loss and self._lost is None:
            how = f"ended with exit code {note.code}" if note.kind == "ended" else f"is lost: {note.text}"
            logger.warning(f"node {note.node} ({note.host}) {how}; ending the job here")
            self._lost, self._kill_at = note, time.monotonic() + GRACE_SECONDS

    def _pass_on_signals(self) -> None:
        assert self._child is not None
        ranks = self._look_for_ranks(self._child.pid)
        while self._asked:
            number = self._asked.popleft()
            if number == signal.SIGUSR2:
                _send(ranks, signal.SIGUSR2)
            elif self._stop is None:
                self._stop = signal.Signals(number).name
                logger.info(f"{self._stop}: the ranks save and end")
                self._links.tell("stop", self._stop)
        if self._stop is not None and self._lost is None:
            # Every tick, for ranks that are started later. Before there are any, torchrun itself is asked; not after:
            # its ranks have saved, and it waits for the other nodes' to do so.
            targets = (ranks if self._ranks else {self._child.pid}) - self._signalled
            _send(targets, signal.Signals[self._stop] if self._ranks else signal.SIGTERM)
            self._signalled |= targets

    def _look_for_ranks(self, child: int) -> set[int]:
        """The processes that a signal is for. When torchrun has started them again, what they said before is past.

        Unless it was final: then they end at once, for they would only say it again.
        """
        if not self._is_torchrun():
            self._ranks = {child}
            return self._ranks
        ranks = set(_children(child))
        if ranks and self._ranks and not ranks & self._ranks:
            if self._said.is_final:
                self._kill_at = time.monotonic()
            else:
                self._said.forget()
        self._ranks = ranks or self._ranks
        return ranks

    def _is_torchrun(self) -> bool:
        return TORCHRUN in self._command

    def _end_what_cannot_go_on(self) -> None:
        assert self._child is not None
        if self._said.is_final and self._kill_at is None:
            self._kill_at = time.monotonic() + _FINAL_SECONDS  # for torchrun to end by itself and report
        if self._kill_at is None or time.monotonic() < self._kill_at:
            return
        self._kill_at = time.monotonic() + GRACE_SECONDS
        ranks = _children(self._child.pid)
        # The agent first, or it would start the ranks again. A second round does not ask any more.
        _send([self._child.pid], signal.SIGKILL if self._child.pid in self._signalled else signal.SIGTERM)
        self._signalled.add(self._child.pid)
        _send(ranks, signal.SIGKILL)

    def _ending(self, status: int) -> Ending:
        cause = self._said.cause_code if status and self._is_torchrun() else None
        code = status if cause is None else cause
        if self._stop is not None and self._lost is None and self._is_clean(code, signal.Signals[self._stop]):
            return Ending(self._place.clean_stop_code)
        if status == 0:
            return Ending(0)
        if code < 0:
            how = f"a rank was ended by {signal.Signals(-code).name}"
            code = 128 - code
        else:
            how = f"exit code {code}"
        error = f"{self._place.host}: {how}"
        if self._lost is not None and self._lost.text:
            error += f"; before, node {self._lost.node}: {self._lost.text}"
        said = last_error(self._said.lines)
        return Ending(code or 1, shortened(redact(f"{error}\n{said}" if said else error)))

    def _is_clean(self, code: int, stop: signal.Signals) -> bool:
        """Whether what a signal asked to stop has ended in order: saved, or too early to have anything to save.

        Too early: the signal itself ended the ranks, or they lost each other by it, or there were none yet.
        """
        return (
            code in (0, -stop, 128 + stop, -signal.SIGTERM)
            or (code == 1 and not last_error(self._said.lines))
            or not self._ranks
        )


class _Passage:
    """Passes what comes out of one pipe on, and keeps its last lines."""

    def __init__(self, target: int, said: Said):
        self._target, self._said, self._rest = target, said, ""

    def pass_on(self, fd: int) -> bool:
        """Read what is there; False at the end of the pipe."""
        while True:
            try:
                chunk = os.read(fd, 65536)
            except BlockingIOError:
                return True
            if not chunk:
                self._said.add(self._rest)
                return False
            with contextlib.suppress(BrokenPipeError):  # nobody reads the log: no reason to end a training
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._target, view) :]
            *lines, self._rest = (self._rest + chunk.decode(errors="replace")).split("\n")
            for line in lines:
                self._said.add(line)


def _end_with_parent() -> None:
    """In the child: be asked to end when this process dies, so that no rank is left behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _collect(child: int) -> int | None:
    """Collect every process that has ended, orphans too; how the child ended, or None while it runs."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, raw = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                status = os.waitstatus_to_exitcode(raw)
    return status


def _children(parent: int) -> list[int]:
    """Processes that `parent` has started, whichever of its threads did."""
    found: list[int] = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that just ended
            found += map(int, path.read_text().split())
    return found


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
