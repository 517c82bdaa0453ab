"""Any fault, bit for bit: a training on two nodes is broken again and again, and must end as if nothing had been.

    python -m tests.faults.chaos --faults 200 --seed 7 [--reshapes 10] [--keep DIR]

Runs of a small model follow each other until so many faults were made. Each is started again after whatever ended it,
as a scheduler does, until it is complete. What must hold is in checks.py, what is done to it in kinds.py. The seed
gives the kinds of faults, their order, their instants and what is hit; how the processes interleave it cannot give.
Needs root (network and mount namespaces).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import checks, kinds
from tests.faults.checks import Reference
from tests.faults.job import Job, Launchers, Violation
from tests.faults.kinds import Condition, Done, Loss
from tests.faults.place import Site, open_site
from tests.faults.plans import Moment, Plan, Planner
from tests.faults.survivors import TIERS, RunPlaces, blob_roots, digest, look
from tests.integration import processes
from tests.nodes import nodes_available

LAST_STEP = 60
_FIRST_PORT = 21000
_QUIET_SECONDS = 90.0  # without a word from any rank: far above what any of them needs
_QUIET_SECONDS_WITHOUT_S3 = 200.0  # requests wait up to 20 s for an answer and 20 s between attempts
_END_SECONDS = 60.0  # for ranks whose peer is gone
_LIFTED_SECONDS = 0.2

FLAGS: dict[str, Any] = {
    "hidden_width": 32,
    "intermediate_size": 64,
    "max_context_width": 32,
    "max_steps": LAST_STEP,
    "validation_batches": 1,
    "resume_from_checkpoint": "auto",
    "local_checkpointing_freq": 5,
    "s3_checkpointing_freq": 6,
    "s3_save_minutes": 0.5,
    "checkpoint_freq": 7,
    "keep_checkpoints": 2,
    "keep_s3_checkpoints": 2,
}


@dataclass
class Statistics:
    faults: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    num_starts: int = 0
    num_refused: int = 0
    num_runs: int = 0
    steps_lost: list[int] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return self.faults.total()

    def table(self) -> str:
        lines = [f"{'fault':<40} times"]
        lines += [f"{kind:<40} {self.faults[kind]}" for kind in kinds.ALL_KINDS if self.faults[kind]]
        lines += [f"{'all':<40} {self.num_faults}", ""]
        lines += [f"runs {self.num_runs}, starts {self.num_starts}, of these refused with a reason {self.num_refused}"]
        froms = ", ".join(f"{tier} {self.restored[tier]}" for tier in (*TIERS, "nothing"))
        lost = self.steps_lost or [0]
        lines += [f"restored from: {froms}", f"steps lost: median {statistics.median(lost)}, most {max(lost)}"]
        return "\n".join(lines)


class Campaign:
    """Runs on `site` until `num_faults` were made. `say` is told what happens."""

    def __init__(self, site: Site, *, seed: int, num_faults: int):
        self.site = site
        self.statistics = Statistics()
        self._num_faults = num_faults
        self.planner = Planner(seed)
        self.launchers = Launchers(site)
        self._references: dict[tuple[int, int], Reference] = {}
        self._conditions: list[Condition] = []
        self._s3_was_broken = False
        self._was_hindered = False  # by a full disk, full memory or S3: a start may be refused then
        self._num_refused_in_row = 0
        self._num_ports = 0
        self._log = site.root / "faults.jsonl"
        self._began_at = time.monotonic()

    def say(self, text: str, **more: Any) -> None:
        seconds = time.monotonic() - self._began_at
        print(f"{seconds:7.1f} s  {text}", flush=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"seconds": round(seconds, 2), "text": text, **more}) + "\n")

    # --- runs ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.statistics.num_faults < self._num_faults:
            self._one_run()
            self.statistics.num_runs += 1

    def _one_run(self) -> None:
        number = self.statistics.num_runs
        draw = self.planner.draw(number, "run")
        shape = (2, draw.choice((1, 1, 1, 2)))
        reference = self._reference(shape)
        flags = {
            "in_memory_checkpointing_freq": draw.choice((2, 2, 3, 3, 0)),
            "async_checkpointing": int(draw.random() < 0.85),
        }
        self.say(f"run {number}: {shape[0]} nodes with {shape[1]} ranks, {flags}")
        places, flags = self.places(f"run-{number}", flags)
        last_step: int | None = None
        while True:
            plan = self.planner.next(is_quiet=self.statistics.num_faults >= self._num_faults)
            job = self.job(f"start-{plan.number}", shape, flags)
            is_complete = self._one_start(plan, job, places, reference, last_step)
            if is_complete:
                break
            last_step = job.step()
        self._check_end(places, reference)
        self.clear(places)
        self.say(f"run {number} is complete and as without faults")

    def _reference(self, shape: tuple[int, int]) -> Reference:
        if shape not in self._references:
            name = f"reference-{shape[0]}x{shape[1]}"
            places, flags = self.places(name, {"in_memory_checkpointing_freq": 3})
            job = self.job(name, shape, flags)
            job.start(self.launchers)
            self.watch(job)
            if set(job.codes().values()) != {0}:
                raise Violation(f"the run without faults ended with {job.codes()}:\n{job.log()[-3000:]}")
            self.launchers.end()
            final = look(self.site, places).best()
            assert final is not None and final.step == LAST_STEP
            lines = {line[0]: line for line in processes.history(places.run_dir)}
            self._references[shape] = Reference(lines, checks.validation_loss(places), digest(final))
            self.clear(places)
            self.say(f"the run without faults on {shape[0]} x {shape[1]} ranks is done")
        return self._references[shape]

    def places(self, name: str, flags: dict[str, Any]) -> tuple[RunPlaces, dict[str, Any]]:
        root = self.site.root
        places = RunPlaces(root / "runs" / name, self.site.shared / name, self.site.uri / name)
        where = {
            "run_dir": places.run_dir,
            "checkpoint_dir": places.checkpoint_dir,
            "s3_tier_base_path": str(places.uri),
            "local_tier_dir": self.site.local_dir,
            "cache_dir": root / "cache",
        }
        return places, {**FLAGS, **flags, **where}

    def job(self, name: str, shape: tuple[int, int], flags: dict[str, Any]) -> Job:
        self._num_ports = (self._num_ports + 1) % 8000
        folder = self.site.root / "starts" / name
        return Job(self.site, folder, shape=shape, flags=flags, port=_FIRST_PORT + self._num_ports)

    # --- one start -------------------------------------------------------------------------------------------

    def _one_start(self, plan: Plan, job: Job, places: RunPlaces, reference: Reference, last_step: int | None) -> bool:
        """Start, disturb, end, check, damage. Returns whether the run is complete."""
        before = look(self.site, places)
        self._s3_was_broken = any(one.name == "s3" for one in self._conditions)
        self._was_hindered = bool(self._conditions)
        self.statistics.num_starts += 1
        job.start(self.launchers)
        loss = self._break(plan, job)
        if loss is None:
            self.watch(job)
        else:
            job.end_all(seconds=_QUIET_SECONDS_WITHOUT_S3 if loss.was_asked else _END_SECONDS, tick=self._tick)
        self._mend("stopped")
        self.settle(job, keep_launchers=plan.keep_launchers)
        checks.check_no_traceback(job)
        checks.check_codes(job, loss, reference)
        checks.check_history(places, reference)
        checks.check_restored(job, before, s3_was_broken=self._s3_was_broken)
        self._count_restore(job, last_step)
        after = look(self.site, places)
        is_complete = set(job.codes().values()) == {0} and job.step() >= reference.last_step
        checks.check_saves_are_there_or_alarmed(job, after)
        if is_complete:
            return True
        if loss is None:
            self._refused(job, places)
        else:
            checks.check_survivors(job, loss, after, reference)
        for kind in plan.damages:
            self._damage(kind, plan, places)
        return False

    def _break(self, plan: Plan, job: Job) -> Loss | None:
        """Make the faults of `plan` that come in time; what the one that ends the job took."""
        for number, (moment, kind) in enumerate(plan.disturbances):
            if not self.wait_for(job, moment):
                return None
            if kind.startswith("S3"):
                self._mend("s3")
            made = kinds.disturb(kind, job, self.planner.draw(plan.number, f"disturbance {number}"))
            if made is None:
                continue
            done, condition = made
            if condition is not None:
                self._conditions.append(condition)
                self._s3_was_broken |= condition.name == "s3"
                self._was_hindered |= condition.name != "stopped"
            self._made(plan, done, moment, job)
        if plan.ending is None or not self.wait_for(job, plan.ending[0]):
            return None
        moment, kind = plan.ending
        ended = kinds.end(kind, job, self.launchers, self.planner.draw(plan.number, "ending"))
        if ended is None:
            return None
        self._made(plan, ended[0], moment, job)
        return ended[1]

    def _made(self, plan: Plan, done: Done, moment: Moment | None, job: Job | None) -> None:
        self.statistics.faults[done.kind] += 1
        at = f" at {moment} (step {job.step()})" if moment is not None and job is not None else ""
        number = self.statistics.num_faults
        self.say(f"start {plan.number}, fault {number}: {done}{at}", kind=done.kind, details=done.details)

    def wait_for(self, job: Job, moment: Moment) -> bool:
        """Whether the job still runs at `moment`."""
        reached_at: float | None = job.started_at if moment.steps is None else None
        watch = _Watch(job)
        while True:
            self._tick()
            if job.codes() or not job.running():
                return False
            if reached_at is None and (begun_at := job.begun_at()) is not None:
                assert moment.steps is not None
                if job.step() >= begun_at + moment.steps:
                    reached_at = time.time()
            if reached_at is not None and time.time() >= reached_at + moment.seconds:
                return True
            watch.look(self._quiet_seconds())
            time.sleep(0.01)

    def watch(self, job: Job) -> None:
        """Until the job has ended by itself."""
        watch = _Watch(job)
        while job.running():
            self._tick()
            watch.look(self._quiet_seconds())
            time.sleep(0.05)

    def _quiet_seconds(self) -> float:
        return _QUIET_SECONDS_WITHOUT_S3 if self._s3_was_broken else _QUIET_SECONDS

    def settle(self, job: Job, *, keep_launchers: bool) -> None:
        """Until nothing changes any more what lies in the tiers."""
        if not keep_launchers:
            self.launchers.end()
            deadline = time.monotonic() + 30
            while job.agent_pids():
                if time.monotonic() > deadline:
                    raise Violation(f"agents {job.agent_pids()} outlived their launchers by 30 s")
                time.sleep(0.05)
        time.sleep(_LIFTED_SECONDS)  # what agents still receive

    def _count_restore(self, job: Job, last_step: int | None) -> None:
        begun_at = job.begun_at()
        if begun_at is not None:
            self._num_refused_in_row = 0
        if last_step is None or begun_at is None:
            return
        restored = checks.restored_from(job)
        self.statistics.restored["nothing" if restored is None else restored[1]] += 1
        self.statistics.steps_lost.append(last_step - begun_at)
        self.say(f"went on from step {begun_at} ({restored[1] if restored else 'nothing'}), had been at {last_step}")

    def _refused(self, job: Job, places: RunPlaces) -> None:
        """A start that ended by itself must have had a reason that we gave it; mend that."""
        codes, log = job.codes(), job.log()
        errors = [line for line in log.splitlines() if " E " in line]
        invalid = "no checkpoint is valid" in log
        if not errors or not (self._was_hindered or invalid):
            raise Violation(f"ended by itself with {codes}:\n{log[-3000:]}")
        self._num_refused_in_row += 1
        if self._num_refused_in_row > 2:
            raise Violation(f"refused {self._num_refused_in_row} times in a row:\n{log[-3000:]}")
        self.statistics.num_refused += 1
        self.say(f"refused with {codes}: {errors[0][:300]}")
        self._mend()
        if invalid:  # as a person would who is told so
            self.clear(places)

    def _damage(self, kind: str, plan: Plan, places: RunPlaces) -> None:
        draw = self.planner.draw(plan.number, kind)
        if kind == "a node's memory is full":
            node = draw.randrange(len(self.site.nodes))
            self.site.fill_memory(node)
            self._conditions.append(Condition("memory", time.monotonic() + 15, lambda: self.site.free_memory(node)))
            self._made(plan, Done(kind, {"node": node}), None, None)
            return
        done = kinds.damage(kind, self.site, places, draw)
        if done is not None:
            self._made(plan, done, None, None)

    # --- conditions ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        for condition in [one for one in self._conditions if one.ends_at <= time.monotonic()]:
            self._conditions.remove(condition)
            condition.lift()

    def _mend(self, name: str | None = None) -> None:
        for condition in [one for one in self._conditions if name in (None, one.name)]:
            self._conditions.remove(condition)
            condition.lift()

    # --- the end of a run ------------------------------------------------------------------------------------

    def _check_end(self, places: RunPlaces, reference: Reference) -> None:
        self._mend()
        if len(processes.history(places.run_dir)) != reference.last_step:
            raise Violation("the run says that it is complete and is not")
        if (found := checks.validation_loss(places)) != reference.validation_loss:
            raise Violation(f"found validation loss {found}, without faults it is {reference.validation_loss}")
        finals = [one for one in look(self.site, places).candidates if one.step == reference.last_step]
        if not any(not one.damaged for one in finals):
            raise Violation("the last step is saved nowhere")
        for final in finals:
            if not final.damaged and (found_digest := digest(final)) != reference.digest:
                raise Violation(
                    f"the last step's tensors in {final.tier} differ from those without faults: {found_digest}"
                )
        held = [str(path) for tier, _, root in blob_roots(self.site, places) for path in root.glob("*/rank-*/*")]
        if held:
            raise Violation(f"a complete run left {held}")

    def clear(self, places: RunPlaces) -> None:
        """Make room for the next run."""
        self.launchers.end()
        self._mend()
        shutil.rmtree(places.checkpoint_dir, ignore_errors=True)
        for name in self.site.objects(places.uri):
            self.site.delete_object(places.uri / name)
        for node in self.site.nodes:
            self.site.clear_disk(node.number)


class _Watch:
    """Raises when a job gives no sign of life for too long."""

    def __init__(self, job: Job):
        self._job = job
        self._signs = job.signs_of_life()
        self._since = time.monotonic()

    def look(self, seconds: float) -> None:
        if (signs := self._job.signs_of_life()) != self._signs:
            self._signs, self._since = signs, time.monotonic()
        elif time.monotonic() - self._since > seconds:
            raise Violation(f"no sign of life for {seconds:.0f} s:\n{self._job.dump_stacks()}")


def run_campaign(root: Path, *, seed: int, num_faults: int, num_reshapes: int = 0) -> tuple[Statistics, str | None]:
    """What happened, and what was violated or None."""
    with open_site(root) as site:
        campaign = Campaign(site, seed=seed, num_faults=num_faults)
        try:
            campaign.run()
            if num_reshapes:
                from tests.faults.reshape import Reshaping

                Reshaping(campaign, num_changes=num_reshapes).run()
        except Violation as violation:
            return campaign.statistics, str(violation)
        return campaign.statistics, None


def main() -> int:
    parser = argparse.ArgumentParser(description="Break a training again and again.")
    parser.add_argument("--faults", type=int, default=200, help="how many to make")
    parser.add_argument("--reshapes", type=int, default=10, help="starts on other numbers of ranks after that")
    parser.add_argument("--seed", type=int, help="default: the time")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and runs; default: removed when all is well")
    arguments = parser.parse_args()
    if reason := nodes_available():
        print(reason, file=sys.stderr)
        return 2
    seed = int(time.time()) % 100_000 if arguments.seed is None else arguments.seed
    root = Path(tempfile.mkdtemp(prefix="chaos-")) if arguments.keep is None else arguments.keep.absolute()
    root.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {arguments.faults} faults, logs in {root}", flush=True)
    began_at = time.monotonic()
    statistics_, violation = run_campaign(root, seed=seed, num_faults=arguments.faults, num_reshapes=arguments.reshapes)
    print(f"\n{statistics_.table()}\nseconds: {time.monotonic() - began_at:.0f}")
    if violation is not None:
        print(f"\nVIOLATED after {statistics_.num_faults} faults: {violation}")
        print(f"\nfault log {root / 'faults.jsonl'}, runs and logs in {root}")
        again = f"--faults {arguments.faults} --reshapes {arguments.reshapes} --seed {seed}"
        print(f"again: python -m tests.faults.chaos {again}")
        return 1
    print("\nevery loss, norm and weight is bit for bit that of the runs without faults")
    if arguments.keep is None:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
