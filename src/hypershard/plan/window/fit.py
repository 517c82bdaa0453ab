"""What of a training fits into a time window: micro-batch by memory, steps by hours. Every answer asks the estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import ConfigError
from ...optim.replan import reserve_hours, steps_that_fit
from .profiles import Profile

# Sequences are not shortened below this; this project's choice.
SHORTEST_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What the planner says of one step of a profile, on the job's `num_gpus`.

    `step_seconds` with what validations and saves add to each; `overhead_seconds`: start, compilation, the last
    validation and the final save together. `band`: the share by which
    `step_seconds` may be wrong either way. `memory_verdict` says in words whether the step fits, and what would help.
    """

    step_seconds: float
    overhead_seconds: float
    band: float
    num_gpus: int
    fits_in_memory: bool
    memory_verdict: str


Estimate = Callable[[Profile], StepCost]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is known of a fine-tuning set: samples of so many tokens on average, packed into sequences."""

    num_samples: int
    avg_tokens_per_sample: float

    def num_sequences(self, context_tokens: int) -> int:
        """Sequences an epoch fills. An average says nothing of the lengths' spread: padding and cut ends left out."""
        tokens = self.num_samples * min(self.avg_tokens_per_sample, context_tokens)
        return max(1, math.floor(tokens / context_tokens))


@dataclass(frozen=True, kw_only=True)
class WindowEstimate:
    """The training as planned, `num_steps` long, beside the one asked for. Hours include the start and final save.

    `low_hours` and `high_hours` come from the estimate's band. `fits_in_window`: within the window less its reserve,
    `fits_at_worst`: `high_hours` too.
    """

    step_seconds: float
    band: float
    num_gpus: int
    samples_per_step: int
    num_steps: int
    epochs: float
    num_tokens: int
    estimated_hours: float
    low_hours: float
    high_hours: float
    asked_steps: int
    asked_epochs: float
    asked_hours: float
    fits_in_window: bool
    fits_at_worst: bool
    memory_verdict: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One question with its givens; the methods try answers and write what they changed into `changes`."""

    samples: Samples
    asked_epochs: float
    max_hours: float
    estimate: Estimate

    def fitted(self, profile: Profile, changes: list[str]) -> tuple[Profile, StepCost]:
        """The largest micro-batch of the profile's (halved again and again) that fits into memory, and its cost."""
        wanted = profile.samples_per_step
        cost = self.estimate(profile)  # as it stands, to learn of the GPUs
        shared_out = batch = min(profile.train_batch_size, math.ceil(wanted / cost.num_gpus))
        while True:
            solved = dataclasses.replace(
                profile,
                train_batch_size=batch,
                gradient_accumulation_steps=math.ceil(wanted / (batch * cost.num_gpus)),
            )
            cost = self.estimate(solved)
            if cost.fits_in_memory or batch == 1:
                break
            batch //= 2
        if not cost.fits_in_memory:
            raise ConfigError(
                f"profile {profile.name}: not even --train_batch_size=1 at --max_context_width="
                f"{profile.max_context_width} fits into memory: {cost.memory_verdict}"
            )
        if solved != profile:
            per_step = solved.samples_per_step * cost.num_gpus
            text = (
                f"micro-batch {solved.train_batch_size} and accumulation {solved.gradient_accumulation_steps} instead "
                f"of {profile.train_batch_size} and {profile.gradient_accumulation_steps}"
            )
            if cost.num_gpus > 1:
                text += f": {wanted} sequences shared out to {cost.num_gpus} GPUs"
            if batch < shared_out:
                text += f"; {shared_out} at a time do not fit into memory"
            changes.append(text if per_step == wanted else f"{text}; a step takes {per_step} sequences, not {wanted}")
        return solved, cost

    def steps(self, profile: Profile, cost: StepCost) -> int:
        """Steps of the epochs asked for."""
        return max(1, int(self.asked_epochs * self._steps_per_epoch(profile, cost)))

    def _steps_per_epoch(self, profile: Profile, cost: StepCost) -> float:
        sequences = self.samples.num_sequences(profile.max_context_width)
        return sequences / (profile.samples_per_step * cost.num_gpus)

    def hours(self, cost: StepCost, num_steps: int, *, slower: float = 0.0) -> float:
        return (cost.overhead_seconds + num_steps * cost.step_seconds * (1 + slower)) / 3600

    def _most_steps(self, cost: StepCost) -> int:
        return steps_that_fit(
            seconds=(self.max_hours - reserve_hours(self.max_hours)) * 3600 - cost.overhead_seconds,
            step_seconds=cost.step_seconds,
        )

    def cut(self, profile: Profile, cost: StepCost, *, give_way: str, changes: list[str]) -> int:
        """As many of the steps asked for as fit, or those of whole epochs."""
        asked, most = self.steps(profile, cost), self._most_steps(cost)
        if most >= asked:
            return asked
        per_epoch = self._steps_per_epoch(profile, cost)
        epochs = math.floor(most / per_epoch)
        num_steps = most if give_way == "steps" else int(epochs * per_epoch)
        if num_steps < 1:
            need = self.hours(cost, 1 if give_way == "steps" else math.ceil(per_epoch)) + reserve_hours(self.max_hours)
            what = "one step" if give_way == "steps" else "one epoch"
            raise ConfigError(
                f"--max_hours={self.max_hours:g} does not hold {what}: it needs {need:,.2f} h with the reserve; raise "
                f"--max_hours, or use more or faster GPUs"
            )
        changes.append(
            f"{num_steps:,} steps ({num_steps / per_epoch:.2f} epochs) instead of {asked:,} "
            f"({self.asked_epochs:g} epochs), which would take {self.hours(cost, asked):,.1f} h"
        )
        return num_steps

    def shortened(self, profile: Profile, cost: StepCost, changes: list[str]) -> tuple[Profile, StepCost]:
        """Sequences halved until the epochs asked for fit, twice as many in a step. Longer samples are cut short."""
        start = profile.max_context_width
        solved = profile
        while self.steps(solved, cost) > self._most_steps(cost):
            if solved.max_context_width // 2 < SHORTEST_TOKENS:
                raise ConfigError(
                    f"--max_hours={self.max_hours:g} does not hold {self.asked_epochs:g} epochs, not even at "
                    f"--max_context_width={solved.max_context_width}; let steps or epochs give way, or raise it"
                )
            shorter = dataclasses.replace(
                solved, max_context_width=solved.max_context_width // 2, train_batch_size=solved.train_batch_size * 2
            )
            # `fitted` shares a whole step out to the GPUs, and this one is shared out already.
            whole = shorter.gradient_accumulation_steps * cost.num_gpus
            solved, cost = self.fitted(dataclasses.replace(shorter, gradient_accumulation_steps=whole), [])
        if solved is not profile:
            text = f"sequences of {solved.max_context_width} tokens instead of {start}, so that all epochs fit"
            if self.samples.avg_tokens_per_sample > solved.max_context_width:
                text += f"; samples have {self.samples.avg_tokens_per_sample:,.0f} on average, and are cut short"
            changes.append(text)
        return solved, cost

    def result(self, profile: Profile, cost: StepCost, num_steps: int) -> WindowEstimate:
        asked = self.steps(profile, cost)
        per_step = profile.samples_per_step * cost.num_gpus
        available = self.max_hours - reserve_hours(self.max_hours)
        hours, high = self.hours(cost, num_steps), self.hours(cost, num_steps, slower=cost.band)
        return WindowEstimate(
            step_seconds=cost.step_seconds,
            band=cost.band,
            num_gpus=cost.num_gpus,
            samples_per_step=per_step,
            num_steps=num_steps,
            epochs=num_steps / self._steps_per_epoch(profile, cost),
            num_tokens=num_steps * per_step * profile.max_context_width,
            estimated_hours=hours,
            low_hours=self.hours(cost, num_steps, slower=-cost.band),
            high_hours=high,
            asked_steps=asked,
            asked_epochs=self.asked_epochs,
            asked_hours=self.hours(cost, asked),
            fits_in_window=hours <= available,
            fits_at_worst=high <= available,
            memory_verdict=cost.memory_verdict,
        )
