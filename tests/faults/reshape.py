"""Killed and started again on other numbers of nodes and ranks: the same tensors, and every sample once.

Losses of other numbers of ranks differ in their last digits, so what is compared is what was saved: the tensors that a
start holds right after it restored are bit for bit those that lay in the tiers, and its counters stand where they did.
"""

from __future__ import annotations

import math
from typing import Any

from tests.faults import checks, kinds
from tests.faults.chaos import LAST_STEP, Campaign
from tests.faults.job import Job, Violation
from tests.faults.plans import Moment
from tests.faults.survivors import DISK, RunPlaces, digest, look
from tests.integration import processes

SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))  # nodes, ranks on each
_SAMPLES_PER_STEP = 4
_FLAGS = {"train_batch_size": 1, "global_batch_tokens": _SAMPLES_PER_STEP * 32, "in_memory_checkpointing_freq": 2}
# Summing in another order changes the last digits, and sixty steps let them grow; other samples change the first ones.
_LOSS_TOLERANCE = 1e-3
_ENDINGS = ("kill one rank", "kill all ranks", "kill all ranks", "lose the memory of all nodes")


class Reshaping:
    """Uses a campaign's site, launchers and watchdog."""

    def __init__(self, campaign: Campaign, *, num_changes: int):
        self._campaign = campaign
        self._num_changes = num_changes
        self._num_starts = 0
        self._draw = campaign.planner.draw(0, "reshape")
        self._shape = self._draw.choice(SHAPES)

    def run(self) -> None:
        name = "reshape-reference"
        campaign = self._campaign
        places, flags = campaign.places(name, _FLAGS)
        self._finish(campaign.job(name, (2, 1), flags))
        expected = {line[0]: line[1] for line in processes.history(places.run_dir)}
        campaign.clear(places)
        while self._num_starts < self._num_changes:
            self._one_run(expected)

    def _one_run(self, expected: dict[int, float]) -> None:
        campaign = self._campaign
        places, flags = campaign.places(f"reshape-{self._num_starts}", _FLAGS)
        while True:
            job = self._job(flags, "train")
            before = look(campaign.site, places, num_nodes=job.num_nodes)
            is_last = self._num_starts >= self._num_changes
            self._train(job, is_last=is_last)
            checks.check_no_traceback(job)
            checks.check_restored(job, before, s3_was_broken=False)
            self._check_losses(places, expected)
            if job.step() >= LAST_STEP:
                break
            self._shape = self._draw.choice([shape for shape in SHAPES if shape != self._shape])
            if self._draw.random() < 0.5:
                self._check_tensors(places, flags)
        campaign.clear(places)

    def _job(self, flags: dict[str, Any], purpose: str) -> Job:
        self._num_starts += 1
        return self._campaign.job(f"reshape-{self._num_starts}-{purpose}", self._shape, flags)

    def _train(self, job: Job, *, is_last: bool) -> None:
        """Some steps and an end, or the rest."""
        campaign = self._campaign
        if is_last:
            self._finish(job)
            return
        job.start(campaign.launchers)
        moment, kind = Moment(self._draw.uniform(0, 0.08), self._draw.randint(3, 14)), self._draw.choice(_ENDINGS)
        if campaign.wait_for(job, moment):
            kinds.end(kind, job, campaign.launchers, self._draw)
            job.end_all()
        campaign.watch(job)
        campaign.settle(job, keep_launchers=False)
        restored = checks.restored_from(job)
        campaign.say(f"{self._shape} from {restored or 'nothing'}, at step {job.step()}: {kind}")

    def _finish(self, job: Job) -> None:
        job.start(self._campaign.launchers)
        self._campaign.watch(job)
        self._campaign.settle(job, keep_launchers=False)
        if set(job.codes().values()) != {0}:
            raise Violation(f"{job.folder} ended with {job.codes()}:\n{job.log()[-3000:]}")

    def _check_losses(self, places: RunPlaces, expected: dict[int, float]) -> None:
        history = processes.history(places.run_dir)
        steps = [line[0] for line in history]
        if steps != list(range(1, len(steps) + 1)):
            raise Violation(f"metrics.jsonl holds steps {steps}, expected each once and in order")
        for step, loss, *_ in history:
            if not math.isclose(loss, expected[step], rel_tol=_LOSS_TOLERANCE):
                raise Violation(f"step {step} has loss {loss}, on two ranks all the time it is {expected[step]}")

    def _check_tensors(self, places: RunPlaces, flags: dict[str, Any]) -> None:
        """A start that has nothing left to do saves just what it restored: to the disk, and as others see it."""
        site = self._campaign.site
        lay = look(site, places, num_nodes=self._shape[0]).best()
        if lay is None:
            return
        expected = digest(lay)
        job = self._job({**flags, "max_steps": lay.step}, "look")
        self._finish(job)
        saved = next(one for one in look(site, places).candidates if one.tier == DISK)
        if saved.step != lay.step or digest(saved) != expected:
            raise Violation(
                f"{lay.tier} step {lay.step} has digest {expected}, restored on {self._shape}: {digest(saved)}"
            )
        assert saved.stored is not None
        facts = saved.stored.facts(saved.stored.manifest())
        counted = (facts["step"], facts["samples"])
        if counted != (lay.step, lay.step * _SAMPLES_PER_STEP):
            raise Violation(f"step and samples are {counted}, a step is {_SAMPLES_PER_STEP} samples")
        self._campaign.say(f"{self._shape} restored {lay.tier} step {lay.step} bit for bit")
