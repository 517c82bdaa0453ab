"""A run directory as values. Imports no torch: a report is read on a laptop."""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import find_place
from ..checkpoint.survey import Best, best_of, survey
from ..errors import CheckpointError, DataError, StorageError
from ..metrics.sinks import read_json_lines
from ..storage import read_json


@dataclass(frozen=True, kw_only=True)
class AgainstPlan:
    """What was planned beside what came; None: no plan said so, or it is not known yet.

    `expected_hours`: elapsed, and to come at the run's pace. `planned_memory_bytes`: what a GPU's allocator was to
    reserve; of a rank on a CPU, all its memory.
    """

    estimated_hours: float
    elapsed_hours: float
    expected_hours: float
    time_accuracy: float
    is_on_track: bool
    planned_memory_bytes: float | None
    dollars_spent: float | None
    dollars_to_come: float | None


@dataclass(frozen=True)
class Written:
    """What the model wrote after `prompt` at its newest validation, and at the first one that asked for this.

    Both are (step, text); the same where there was only one.
    """

    prompt: str
    first: tuple[int, str]
    newest: tuple[int, str]


@dataclass(frozen=True)
class RunSummary:
    """A run's numbers. Losses in nats per token, or per pair of answers, of which `preference_accuracy` is the share
    whose chosen answer was preferred at the last validation; speeds are medians over the logged steps but the first.

    `best`: of several validations the lowest loss; None: there was one at most.
    `data_share`: of the time in steps, what rank 0 waited for its batches; `padding`: mean share of its inputs that
    only fill up rows.
    `texts`: what the model wrote at validations, in the prompts' order.
    `alarms`: what went wrong beside the training, with its time in seconds since 1970.
    """

    run_dir: Path
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    validation_losses: tuple[tuple[int, float], ...]
    preference_accuracy: float | None
    best: Best | None
    texts: tuple[Written, ...]
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int
    data_share: float
    padding: float
    checkpoint_steps: tuple[int, ...]
    alarms: tuple[tuple[float, str], ...]
    plan: AgainstPlan | None


def read_run(run_dir: Path) -> RunSummary:
    """Read `metrics.jsonl` and the checkpoint folder's names. Raises DataError when there is no run."""
    path = run_dir / "metrics.jsonl"
    records = read_json_lines(path)
    training = [record for record in records if "loss" in record]
    if not training:
        raise DataError(f"{run_dir} holds no run: {path} is {'empty' if path.exists() else 'missing'}")
    validations = [record for record in records if "validation_loss" in record]
    steady = training[1:] or training  # the first step also fills caches
    utilisations = [record["mfu"] for record in steady if record["mfu"] is not None]
    return RunSummary(
        run_dir=run_dir,
        steps=tuple(record["step"] for record in training),
        losses=tuple(record["loss"] for record in training),
        validation_losses=tuple((record["step"], record["validation_loss"]) for record in validations),
        best=_best(run_dir, validations),
        texts=_texts(run_dir),
        preference_accuracy=validations[-1].get("validation_preference_accuracy") if validations else None,
        tokens=training[-1]["tokens"],
        seconds=_total_seconds(training),
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in steady),
        mfu=statistics.median(utilisations) if utilisations else None,
        memory_bytes=max(record["memory_bytes"] for record in training),
        data_share=sum(record["data_seconds"] for record in steady) / sum(record["step_seconds"] for record in steady),
        padding=statistics.fmean(record["padding"] for record in steady),
        checkpoint_steps=_checkpoint_steps(run_dir),
        alarms=_alarms(run_dir),
        plan=_against_plan(run_dir, training[-1]),
    )


def _against_plan(run_dir: Path, last: dict[str, Any]) -> AgainstPlan | None:
    if "optimization/time_accuracy" not in last:
        return None
    planned = run_dir / "plan.json"
    memory = None
    if planned.exists():
        content = read_json(planned)
        memory = content["memory"]["gpu"]["needed_bytes" if content["job"]["gpu"] == "CPU" else "reserved_bytes"]
    elapsed = last["training/elapsed_hours"]
    return AgainstPlan(
        estimated_hours=last["optimization/estimated_hours"],
        elapsed_hours=elapsed,
        expected_hours=elapsed + last["training/remaining_hours"],
        time_accuracy=last["optimization/time_accuracy"],
        is_on_track=bool(last["training/on_track"]),
        planned_memory_bytes=memory,
        dollars_spent=last.get("training/dollars_spent"),
        dollars_to_come=last.get("training/dollars_to_come"),
    )


def _best(run_dir: Path, validations: list[dict[str, Any]]) -> Best | None:
    """As the newest checkpoint has it, because --step=best means that one; without a checkpoint, the lowest."""
    losses = {record["step"]: record["validation_loss"] for record in validations}
    if len(losses) < 2:
        return None
    with contextlib.suppress(CheckpointError, StorageError):
        if best := best_of(survey(find_place(str(run_dir)))):
            return best
    step = min(losses, key=lambda step: (math.isnan(losses[step]), losses[step]))
    return Best(losses[step], step, is_kept=False)


def _texts(run_dir: Path) -> tuple[Written, ...]:
    records = read_json_lines(run_dir / "texts.jsonl")
    first: dict[str, tuple[int, str]] = {}
    newest: dict[str, tuple[int, str]] = {}
    for record in records:
        first.setdefault(record["prompt"], (record["step"], record["text"]))
        newest[record["prompt"]] = (record["step"], record["text"])
    # Of prompts that were given up when a run went on with others nothing new is known.
    last_step = max((step for step, _ in newest.values()), default=0)
    return tuple(Written(prompt, first[prompt], came) for prompt, came in newest.items() if came[0] == last_step)


def _total_seconds(training: list[dict[str, Any]]) -> float:
    """Seconds in steps; steps that were not logged count as the logged one after them."""
    total, previous = 0.0, 0
    for record in training:
        total += record["step_seconds"] * (record["step"] - previous)
        previous = record["step"]
    return total


def _checkpoint_steps(run_dir: Path) -> tuple[int, ...]:
    manifests = sorted((run_dir / "checkpoints").glob("step-*/MANIFEST.json"))
    # A step that was saved again has a number behind it: step-00000060.2
    return tuple(sorted({int(path.parent.name.removeprefix("step-").partition(".")[0]) for path in manifests}))


def _alarms(run_dir: Path) -> tuple[tuple[float, str], ...]:
    events = run_dir / "events.jsonl"
    records = read_json_lines(events) if events.exists() else []
    return tuple((record["at"], record["text"]) for record in records if record.get("event") == "alarm")
