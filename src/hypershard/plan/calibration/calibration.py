"""What a run's steps really took against the closed form: a factor that plans of like runs are multiplied by.

The same settings on the same GPU take the same time, so there the measured seconds stand as they are. Elsewhere the
factor measured / predicted is carried over from the nearest run, with a band that grows with the distance.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from ... import __version__
from ...errors import ConfigError
from ...units import format_count
from ..bytes import gpu_moments, reserved_bytes
from ..here import CPU
from ..job import Job, sizes_of
from ..steps import StepTime, coefficients, peak_flops, step_time

DROPPED_STEPS = 5  # the first, which fill caches and settle the allocator
_SLOW = 3.0  # times the median: a step beside a save or a validation, or one that waited for data
LEAST_STEPS = 10
NEAR = 4.0  # times larger or smaller that every size of a near run may be
FAR = 32.0  # and of any run that counts: one of a tiny model measures the launching of kernels


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What ran, as far as a step's time depends on it. `peak_tflops` is of one GPU (a CPU's rank: of its cores)."""

    model_type: str
    parameters: int
    active_parameters: int
    hidden_width: int
    num_layers: int
    context_tokens: int
    train_batch_size: int
    accumulation: int
    num_gpus: int
    num_nodes: int
    sharding_strategy: str
    activation_checkpointing: str
    attention: str
    compile: bool
    bf16: bool
    deterministic: bool
    offload_activations: bool
    cpu_offload: bool
    has_adapters: bool
    has_reference: bool
    bnb_quant_type: str
    peak_tflops: float

    def __str__(self) -> str:
        return (
            f"{self.model_type} with {format_count(self.parameters)} parameters, {self.accumulation} x "
            f"{self.train_batch_size} x {self.context_tokens:,} tokens on each of {self.num_gpus} ranks"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one run measured. `step_seconds` is the median of `num_steps` steps, `iqr_seconds` the range of their middle
    half; `predicted_seconds` is what the closed form, whose state `closed_form` names, said of this very run.

    Memory is what the allocator reserved on a GPU; None where it was not measured, or is not predicted: on a CPU.
    `run` is the name of the run's folder, `date` year-month-day.
    """

    run: str
    date: str
    gpu: str
    software: str
    setup: Setup
    step_seconds: float
    iqr_seconds: float
    num_steps: int
    predicted_seconds: float
    closed_form: str
    memory_bytes: float | None
    predicted_memory_bytes: float | None

    @property
    def factor(self) -> float:
        """How many times longer a step takes than the closed form says."""
        return self.step_seconds / self.predicted_seconds


@dataclass(frozen=True)
class Match:
    """The calibration to plan with. `band` is relative, either way; `is_same`: it ran with the planned settings."""

    calibration: Calibration
    band: float
    is_same: bool


def setup_of(job: Job) -> Setup:
    """The job as calibrations compare it. Raises ConfigError where the GPU's peak is unknown, naming the flag."""
    sizes, parallel = sizes_of(job.model), job.parallel
    return Setup(
        model_type=job.model.model_type,
        parameters=sizes.total,
        active_parameters=sizes.active,
        hidden_width=job.model.hidden_width,
        num_layers=job.model.num_layers,
        context_tokens=job.model.max_context_width,
        train_batch_size=job.data.train_batch_size,
        accumulation=job.accumulation,
        num_gpus=job.num_gpus,
        num_nodes=job.num_nodes,
        sharding_strategy=parallel.sharding_strategy,
        activation_checkpointing=parallel.activation_checkpointing,
        attention=job.attention_path if job.data.document_mask else "unmasked",
        compile=parallel.compile,
        bf16=parallel.bf16,
        deterministic=parallel.deterministic,
        offload_activations=parallel.offload_activations,
        cpu_offload=parallel.cpu_offload,
        has_adapters=job.has_adapters,
        has_reference=job.has_reference,
        bnb_quant_type=job.adapters.bnb_quant_type,
        peak_tflops=round(peak_flops(job) / 1e12, 6),
    )


def calibrate(
    job: Job,
    *,
    run: str,
    step_seconds: Sequence[float],
    memory_bytes: float | None,
    software: str,
    today: datetime.date,
) -> Calibration:
    """What `job` measured as `run`: `step_seconds` of its steps in their order, the peak of memory the allocator
    reserved on its fullest GPU (None: unknown, or a CPU's), on `software` as `installed_software` puts it.

    The first 5 steps are left out, and those of more than 3 times the median. Raises ConfigError when fewer than 10 are
    left, or the GPU's peak is unknown, naming the flag.
    """
    settled = step_seconds[DROPPED_STEPS:]
    limit = _SLOW * statistics.median(settled) if settled else 0.0
    kept = [seconds for seconds in settled if seconds <= limit]
    if len(kept) < LEAST_STEPS:
        raise ConfigError(
            f"run {run}: {len(step_seconds)} steps were logged, of which {len(kept)} are left without the first "
            f"{DROPPED_STEPS} and those of over {_SLOW:g} times the median; expected at least {LEAST_STEPS}: train for "
            f"more steps (--max_steps), and log every one (--logging_freq=1)"
        )
    low, middle, high = statistics.quantiles(kept, n=4, method="inclusive")
    return Calibration(
        run=run,
        date=today.isoformat(),
        gpu=job.instance.gpu.name,
        software=software,
        setup=setup_of(job),
        step_seconds=middle,
        iqr_seconds=high - low,
        num_steps=len(kept),
        predicted_seconds=step_time(job).seconds,
        closed_form=closed_form_state(),
        memory_bytes=memory_bytes,
        predicted_memory_bytes=reserved_bytes(gpu_moments(job)) if job.has_gpus else None,
    )


@functools.cache
def installed_software() -> str:
    """Versions a step's time depends on, of what is installed here; a login node may have no torch."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "unknown"
    return software_name(torch=torch, hypershard=__version__)


def software_name(*, torch: str, hypershard: str) -> str:
    return f"torch {torch}, hypershard {hypershard}"


@functools.cache
def closed_form_state() -> str:
    """A digest of what predicts a step's time: a factor against another closed form says nothing of this one."""
    here = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in ("coefficients.json", "steps.py", "bytes.py", "job.py", "here.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:12]


# --- which one to plan with


def nearest(job: Job, calibrations: Sequence[Calibration], *, software: str) -> Match | None:
    """The calibration to plan `job` with when it runs on `software`; None: no run like it was measured on this GPU.

    Of those with the narrowest band it is the nearest in sizes and settings, of equally near ones the newest. Bands
    stand in coefficients.json; other software takes the next wider one, and none is below half of the measured steps'
    own spread. Factors against another state of the closed form count for the same settings alone.
    """
    setup = setup_of(job)
    candidates = [
        one for one in calibrations if one.gpu == job.instance.gpu.name and (one.setup == setup or _counts(one, setup))
    ]
    if not candidates:
        return None
    newest_first = sorted(candidates, key=lambda one: one.date, reverse=True)
    best = min(newest_first, key=lambda one: (_class(one, setup, software), _distance(one.setup, setup)))
    band = bands()[_CLASSES[_class(best, setup, software)]]
    return Match(best, max(band, best.iqr_seconds / best.step_seconds / 2), best.setup == setup)


def calibrated(step: StepTime, job: Job, calibrations: Sequence[Calibration], *, software: str) -> StepTime:
    """`step`, the closed form's of `job`, scaled by the calibration nearest to it; as it is where there is none."""
    if not calibrations:
        return step
    outdated = [
        f"the calibration by {one.run}, {one.date}, counts for its own settings alone: the closed form has changed "
        f"since; calibrate on the run again"
        for one in calibrations
        if one.gpu == job.instance.gpu.name and one.closed_form != closed_form_state() and one.setup != setup_of(job)
    ]
    match = nearest(job, calibrations, software=software)
    if match is None:
        return replace(step, assumptions=(*step.assumptions, *outdated))
    found = match.calibration
    if match.is_same:  # what was measured, whatever the closed form said of it then
        factor, carried = found.step_seconds / step.seconds, []
    else:
        factor = found.factor
        carried = [f"{found.factor:.3g} times the closed form's seconds, as run {found.run} took: {found.setup}"]
    return replace(
        step,
        level=f"calibrated by {found.run}, {found.date}",
        seconds=step.seconds * factor,
        parts={name: seconds * factor for name, seconds in step.parts.items()},
        mfu=step.mfu / factor,
        band=match.band,
        assumptions=(*carried, *outdated),
    )


def bands() -> Mapping[str, float]:
    """Bands of plans by a calibration: of the `same` settings, of `near` and `other` ones; relative, either way."""
    found: dict[str, float] = coefficients()["calibrated_bands"]
    return found


_CLASSES = ("same", "near", "other")
_SIZES = ("active_parameters", "hidden_width", "num_layers", "context_tokens", "train_batch_size", "num_gpus")
_KINDS = (
    *("model_type", "attention", "compile", "bf16", "deterministic", "offload_activations", "cpu_offload"),
    *("has_adapters", "has_reference", "bnb_quant_type"),
)
_TRADES = ("sharding_strategy", "activation_checkpointing", "accumulation")  # whose work the closed form counts well


def _ratios(one: Setup, other: Setup) -> list[float]:
    """By how many times each size differs, the larger over the smaller."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in _SIZES]
    return [max(pair) / min(pair) for pair in pairs]


def _is_near(one: Setup, other: Setup) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _KINDS) and max(_ratios(one, other)) <= NEAR


def _counts(one: Calibration, setup: Setup) -> bool:
    """Whether its factor says something of `setup`: against the same closed form, which starts from the same peak (a
    CPU's is that of the rank's cores), and of sizes not too far."""
    same_peak = one.gpu == CPU or one.setup.peak_tflops == setup.peak_tflops
    return same_peak and one.closed_form == closed_form_state() and max(_ratios(one.setup, setup)) <= FAR


def _class(one: Calibration, setup: Setup, software: str) -> int:
    """Which of _CLASSES the calibration is of for a run with `setup` on `software`."""
    number = 0 if one.setup == setup else 1 if _is_near(one.setup, setup) else 2
    return min(number + (not _same_software(one.software, software)), 2)


def _distance(one: Setup, other: Setup) -> float:
    """A sum over sizes and settings: a doubling counts 0.7, another setting 1 or, where it is cheap to foresee, 0.3."""
    kinds = sum(getattr(one, name) != getattr(other, name) for name in _KINDS)
    trades = sum(getattr(one, name) != getattr(other, name) for name in _TRADES)
    trades += (one.num_nodes > 1) != (other.num_nodes > 1)
    return sum(math.log(ratio) for ratio in _ratios(one, other)) + kinds + 0.3 * trades


def _same_software(one: str, other: str) -> bool:
    """An unknown torch, on a login node without one, is taken for the run's."""
    if "torch unknown" in (one.partition(", ")[0], other.partition(", ")[0]):
        one, other = one.partition(", ")[2], other.partition(", ")[2]
    return one == other
