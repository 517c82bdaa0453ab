"""What must hold after every start of a run, whatever was done to it. Every function raises Violation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.job import Job, Violation
from tests.faults.kinds import Loss
from tests.faults.survivors import DISK, LOCAL, MEMORY, S3, RunPlaces, Survivors
from tests.integration import processes

from hypershard.metrics.sinks import read_json_lines

_RESTORED = re.compile(r"restored step (\d+) from (.*)")
_SURPRISE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run on as many ranks gives: its lines by step, its validation loss and its tensors."""

    history: dict[int, tuple[Any, ...]]
    validation_loss: float
    digest: str

    @property
    def last_step(self) -> int:
        return max(self.history)


def validation_loss(places: RunPlaces) -> float:
    found = [
        one["validation_loss"] for one in read_json_lines(places.run_dir / "metrics.jsonl") if "validation_loss" in one
    ]
    if len(found) != 1:
        raise Violation(f"found {len(found)} validations in metrics.jsonl, expected one")
    return float(found[0])


def check_history(places: RunPlaces, reference: Reference) -> None:
    """Every step that was done, each once, is bit for bit the reference's."""
    history = processes.history(places.run_dir)
    steps = [line[0] for line in history]
    if steps != list(range(1, len(steps) + 1)):
        raise Violation(f"metrics.jsonl holds steps {steps}, expected each once and in order")
    for line in history:
        if line != reference.history[line[0]]:
            raise Violation(
                f"step {line[0]}: found (step, loss, norm, lr, tokens) {line}, without faults it is "
                f"{reference.history[line[0]]}"
            )


def check_no_traceback(job: Job) -> None:
    """Faults of the surroundings are told in a sentence."""
    log = job.log()
    if _SURPRISE in log:
        at = log.index(_SURPRISE)
        raise Violation(f"a traceback in {job.folder}:\n{log[at : at + 3000]}")


def check_codes(job: Job, loss: Loss | None, reference: Reference) -> None:
    """No rank says that all is well before the end, unless it was asked to stop and did."""
    done = job.step() >= reference.last_step
    stopped = any(one["event"] == "stopped" for one in job.events())
    if 0 in job.codes().values() and not done and not (loss is not None and loss.was_asked and stopped):
        raise Violation(f"exit codes {job.codes()} at step {job.step()} of {reference.last_step}")


def restored_from(job: Job) -> tuple[int, str] | None:
    """Step and tier that this start went on from; None when it began anew or did not come so far."""
    found = _RESTORED.search(job.log())
    if found is None:
        return None
    location = found[2]
    if location.startswith("s3://"):
        return int(found[1]), S3
    first = location.split(" ", 1)[0]
    return int(found[1]), first if first in (MEMORY, LOCAL) else DISK


def check_restored(job: Job, survivors: Survivors, *, s3_was_broken: bool) -> None:
    """The start went on from the newest of what lay there, and named what was damaged on the way."""
    begun_at = job.begun_at()
    if begun_at is None:
        return
    allowed = {survivors.newest_step()} | ({survivors.newest_step(without=[S3])} if s3_was_broken else set())
    if begun_at not in allowed:
        lay = [(one.tier, one.lineage.generation, one.step, one.damaged) for one in survivors.candidates]
        raise Violation(f"went on from step {begun_at}, expected {sorted(allowed)}; there lay {lay}")
    log = job.log()
    # The table of every blob is read by its node's first rank.
    unnamed = [name for name in survivors.broken_tables if name not in log]
    if (restored := restored_from(job)) is not None and not s3_was_broken:
        for candidate in survivors.met_before(*restored):
            if not any(name in log for name in candidate.damaged):
                unnamed += candidate.damaged
    if unnamed:
        raise Violation(f"damaged files were passed over without a word: {unnamed}")


def check_saves_are_there_or_alarmed(job: Job, survivors: Survivors) -> None:
    """A save to a durable tier that another one followed is there, or there is an alarm."""
    events = job.events()
    alarms = " ".join(str(one["text"]) for one in events if one["event"] == "alarm")
    for tier in (DISK, S3):
        saved = [one for one in events if one["event"] == "saved" and {tier, "all"} & set(one["tiers"])]
        steps = sorted({int(one["step"]) for one in saved})
        there = {one.step for one in survivors.candidates if one.tier == tier}
        if len(steps) > 1 and steps[-2] not in there and tier not in alarms:
            raise Violation(f"step {steps[-2]} was saved to {tier}, where only {sorted(there)} are; alarms: {alarms!r}")


def must_have_survived(job: Job, loss: Loss, reference: Reference) -> int:
    """A step that a restart cannot fall behind, by what this start wrote down and what was taken from it.

    A save is certainly whole everywhere when the next one to its tier has begun; in memory, when the step after it is
    written down. Copies may lag by one save. Alarms make no save certain but those of the nodes' own memory.
    """
    begun_at, events = job.begun_at(), job.events()
    if begun_at is None:
        return 0
    saved = [one for one in events if one["event"] == "saved"]
    stopped = [one for one in events if one["event"] == "stopped"]
    has_alarms = any(one["event"] == "alarm" for one in events)
    if loss.was_asked and stopped:
        return int(stopped[-1]["step"])
    steps = {tier: [int(one["step"]) for one in saved if tier in one["tiers"]] for tier in (LOCAL, DISK, S3)}
    sure = [0]
    if not has_alarms:
        for tier in (DISK, S3, *(() if loss.disks else (LOCAL,))):
            sure += steps[tier][:-1]
    if job.has_memory and job.step() < reference.last_step:  # at its end a run gives its memory back
        in_memory = [int(one["step"]) for one in saved]
        if not loss.memory:
            sure += [step for step in in_memory if step < job.step()]
        elif len(loss.memory) < len(job.site.nodes) and not has_alarms:
            sure += in_memory[:-1]
    return max(sure)


def check_survivors(job: Job, loss: Loss, survivors: Survivors, reference: Reference) -> None:
    bound = must_have_survived(job, loss, reference)
    if survivors.newest_step() < bound:
        lay = [(one.tier, one.lineage.generation, one.step, one.damaged) for one in survivors.candidates]
        raise Violation(f"step {bound} must have survived {loss}, found {lay}; events: {_short(job.events())}")


def _short(events: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{one['event']} {one.get('step', '')} {one.get('tiers', one.get('text', ''))}" for one in events]
