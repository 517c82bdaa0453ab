"""What to do when a job's ranks have ended: the run's own record decides, not the exit code.

torchrun exits 1 after a clean stop as after a crash, so the exit code alone says too little. `<run_dir>/events.jsonl`
says how far the run came; the job script adds a line `launched` each time it starts the ranks, and `preempted` when
they had to make room. From these:

    start     go on, in this allocation
    done      the run is complete
    stopped   a person stopped it: do not undo that
    requeue   give the nodes back and queue up again
    replace   as requeue, and some nodes are proved ill: name them to who replaces them
    give_up   starting again would do the same again

Everything here is a function of what was read; nothing is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HypershardError, StorageError, TrainingDiverged, UserError
from ..storage import readable_errors

TOLD = {"cancel": "asked to stop", "time_limit": "the job's time is nearly over", "preemption": "preempted"}
"""Why a job was told to stop: by a person, because its time is nearly over, or to make room for another."""

_ERROR_CHARACTERS = 300
# As Slurm names them, without the marks it adds (down*): these nodes do no more work, those shall get no more.
_ILL = {"down", "fail", "failing"}
_LEAVING = {"drain", "drained", "draining", "maint", "reboot", "reboot_issued", "reboot_requested"}
_REMEDIES = {"replace": "Replace", "reboot": "Reboot"}  # a health check's words, and HyperPod's


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the record says of a run as one job sees it.

    `stuck_launches`: launches of this job since the run last came further than ever before. `step`: the newest step
    saved or started from. `end`: how the last launch ended ("stopped" with its reason, "failed" with its error), None
    where it wrote neither. `last_error`: of any launch of this job.
    """

    stuck_launches: int = 0
    step: int = 0
    end: Mapping[str, Any] | None = None
    last_error: str | None = None


@dataclass(frozen=True)
class IllNode:
    """A node that is proved ill. `remedy` is "Replace" or "Reboot"."""

    name: str
    remedy: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The job's nodes that are not well: `ill` ones, and `leaving` ones that finish their jobs and get no others."""

    ill: tuple[IllNode, ...] = ()
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`action` is one of the words above, `reason` one line for people, `ill` the nodes to replace."""

    action: str
    reason: str
    ill: tuple[IllNode, ...] = ()

    def line(self) -> str:
        """One line that a shell reads: `action nodes reason`; nodes are `name=Remedy,...` or `-`."""
        nodes = ",".join(f"{node.name}={node.remedy}" for node in self.ill) or "-"
        return f"{self.action} {nodes} {self.reason}"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole records of events.jsonl, [] where there is none.

    A line that a lost node cut off may stand anywhere once others were appended; the verdict must come all the same.
    """
    if not path.exists():
        return []
    with readable_errors(path, "reading"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record:
            records.append(record)
    return records


def summarise(events: Iterable[Mapping[str, Any]], *, job: str | None) -> Record:
    """What `events` say, counting launches of `job` alone (None: of any job)."""
    stuck, step, is_ours = 0, 0, True
    end: Mapping[str, Any] | None = None
    last_error: str | None = None
    for event in events:
        kind = event["event"]
        if kind == "launched":
            end = None
            is_ours = job is None or str(event.get("job")) == job
            stuck = stuck + 1 if is_ours else 0
        elif kind == "preempted":
            stuck = max(0, stuck - 1)  # not its fault that it came no further
        elif kind in ("started", "saved", "stopped") and isinstance(event.get("step"), int) and event["step"] > step:
            step = event["step"]
            # A launch that begins further on has still to show that it comes further itself.
            stuck = min(stuck, 1) if kind == "started" else 0
        if kind in ("stopped", "failed"):
            end = event
        if kind == "failed" and is_ours:
            last_error = _one_line(str(event.get("error", "")))
    return Record(stuck_launches=stuck, step=step, end=end, last_error=last_error)


def unwell(states: str, health: str = "", *, among: Sequence[str] | None = None) -> Nodes:
    """The nodes that are not well, from Slurm and from a health check.

    `states`: lines `node state`, as of `sinfo -N -o '%N %T'`. `health`: JSON lines with host, verdict and reason, as
    `hypershard doctor --node` prints them; other lines are passed over. `among`: the job's nodes, None: all named.
    """
    ill: dict[str, IllNode] = {}
    leaving: set[str] = set()
    for line in states.splitlines():
        name, _, text = line.strip().partition(" ")
        words = set(re.findall(r"[a-z_]+", text.lower()))  # idle+drain, down*, draining@
        if words & _ILL:
            ill[name] = IllNode(name, "Replace", f"Slurm says {text.strip()}")
        elif words & _LEAVING:
            leaving.add(name)
    for finding in _findings(health):
        remedy = _REMEDIES.get(str(finding["verdict"]))
        name = str(finding["host"])
        if remedy is not None and _is_host(name) and name not in ill:
            ill[name] = IllNode(name, remedy, f"health check: {_one_line(str(finding.get('reason', 'no reason')))}")
    if among is not None:
        ill = {name: node for name, node in ill.items() if name in among}
        leaving &= set(among)
    return Nodes(ill=tuple(ill.values()), leaving=tuple(sorted(leaving)))


def judge(record: Record, *, exit_code: int | None, told: str | None, max_restarts: int, nodes: Nodes) -> Verdict:
    """What to do now.

    `exit_code`: of the launch that ended, None: none was started yet. `told`: one of TOLD, None: nobody asked the job
    to stop. `max_restarts`: launches without a newer step than before after which the job is given up.
    """
    assert told is None or told in TOLD
    found = _first_start(record) if exit_code is None else _ended(record, exit_code, nodes)
    if found.action == "done":
        return found
    if told == "cancel":
        return Verdict("stopped", f"{TOLD[told]}; {_kept(record)}")
    if found.action in ("stopped", "give_up"):
        return found
    if record.stuck_launches >= max(1, max_restarts):
        return Verdict("give_up", _stuck(record, nodes))
    if told is not None:
        return Verdict("requeue", f"{TOLD[told]}; {_kept(record)}")
    return found


def _first_start(record: Record) -> Verdict:
    before = f"after {_launches(record)} without progress; " if record.stuck_launches else ""
    return Verdict("start", f"{before}{_kept(record)}")


def _ended(record: Record, exit_code: int, nodes: Nodes) -> Verdict:
    """The verdict of how the last launch ended, whoever asked for it."""
    end = record.end
    if end is not None and end["event"] == "stopped":
        return _after_stop(str(end.get("reason")), record)
    error = "" if end is None else _one_line(str(end.get("error", "")))
    if error.partition(":")[0] in _LASTING_ERRORS:
        return Verdict("give_up", f"the same start would fail the same way: {error}")
    if end is None and exit_code == 0:
        return Verdict("done", "the ranks ended well")  # an evaluation writes no end
    return _after_crash(record, exit_code, nodes)


def _after_stop(reason: str, record: Record) -> Verdict:
    if reason in ("steps", "hours"):
        return Verdict("done", f"all {reason} are done; {_kept(record)}")
    if reason == "early":
        return Verdict("done", f"the validation loss fell no further; {_kept(record)}")
    if reason == "SIGINT":
        return Verdict("stopped", f"interrupted by hand; {_kept(record)}")
    if reason == "time limit":
        return Verdict("requeue", f"the run stopped itself before the job's end; {_kept(record)}")
    return Verdict("requeue", f"the ranks were asked to stop ({reason}), as at a preemption; {_kept(record)}")


def _after_crash(record: Record, exit_code: int, nodes: Nodes) -> Verdict:
    what = f"exit code {exit_code}, {_error(record)}"
    if nodes.ill:
        found = "; ".join(f"{node.name}: {node.reason}" for node in nodes.ill)
        return Verdict("replace", f"{found}; {what}", nodes.ill)
    if nodes.leaving:
        return Verdict("requeue", f"{', '.join(nodes.leaving)} shall get no more work; {what}")
    return Verdict("start", f"again, after {what}; {_kept(record)}")


def _lasting_errors() -> frozenset[str]:
    """Names of errors that the same start meets again. A disk may have room again: no StorageError."""
    names = {TrainingDiverged.__name__}
    todo: list[type[HypershardError]] = [UserError]
    while todo:
        error = todo.pop()
        if error is not StorageError:
            names.add(error.__name__)
            todo += error.__subclasses__()
    return frozenset(names)


_LASTING_ERRORS = _lasting_errors()


def _stuck(record: Record, nodes: Nodes) -> str:
    ill = "".join(f"; {node.name} is ill ({node.reason})" for node in nodes.ill)
    return f"{_launches(record)} without a newer step than {record.step}; {_error(record)}{ill}"


def _launches(record: Record) -> str:
    return f"{record.stuck_launches} launch{'es' if record.stuck_launches > 1 else ''}"


def _error(record: Record) -> str:
    if record.last_error is None:
        return "no error on record (a killed rank leaves none), see the log"
    return f"last error: {record.last_error}"


def _kept(record: Record) -> str:
    return f"newest step {record.step}" if record.step else "nothing saved yet"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _ERROR_CHARACTERS else f"{line[: _ERROR_CHARACTERS - 1]}…"


def _findings(health: str) -> list[dict[str, Any]]:
    found = []
    for line in health.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"host", "verdict"} <= value.keys():
            found.append(value)
    return found


def _is_host(name: str) -> bool:
    """Whether `name` may stand in a command line: a health check's output comes from a machine that may be ill."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
