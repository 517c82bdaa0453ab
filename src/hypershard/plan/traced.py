"""Memory of a GPU from a trace: the training itself, wrapped as it will be, run without content in another process.

Finer than the closed form (bytes.py), and slower: some seconds. What torch allocates and frees is recorded and played
through its allocator's rules (dry_run/). This process imports no torch; answers are kept in --cache_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HypershardError, StorageError
from ..storage import make_directory, write_json
from .bytes import OUTSIDE_BYTES, USABLE_SHARE, Fit, Moment, Term, peak
from .job import Job

LEVEL = "traced"
BAND = 0.05  # two readings of torchtitan on H100s are met to 4 % (tests/dry_run/test_published.py)
TIMEOUT_SECONDS = 120.0
_DISTRIBUTIONS = ("torch", "transformers", "hypershard")
# What decides what is allocated; a change in any of it makes kept answers worthless.
_FOLDERS = ("adapters", "dry_run", "models", "parallel", "optim")
_FILES = ("distributed/mesh.py", "train/setup.py", "train/step.py", "train/loss.py", "train/attention.py")
_NUM_LAST_LINES = 3


class CannotTrace(HypershardError):
    """The trace gave no answer; the closed form still does."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A GPU's memory as traced. `moments`: the most of each part of a step, by category; `stream_bytes`: each stream's
    own most; `reserved_bytes`: what torch's allocator takes for it. `seconds` it took, if it was not kept from before.
    """

    moments: tuple[Moment, ...]
    stream_bytes: Mapping[str, float]
    reserved_bytes: float
    fit: Fit
    seconds: float
    was_kept: bool

    @property
    def peak(self) -> Moment:
        return peak(self.moments)

    @property
    def active_bytes(self) -> float:
        """Most in use at once."""
        return self.peak.num_bytes

    @property
    def needed_bytes(self) -> float:
        return self.fit.needed_bytes

    @property
    def categories(self) -> dict[str, float]:
        """What is in use at the peak."""
        return {term.name: term.num_bytes for term in self.peak.terms}

    @property
    def dominant(self) -> str:
        return max(self.peak.terms, key=lambda term: term.num_bytes).name

    def as_dict(self) -> dict[str, Any]:
        return {
            "level": LEVEL,
            "band": BAND,
            "verdict": self.fit.verdict,
            "dominant": self.dominant,
            "needed_bytes": self.needed_bytes,
            "usable_bytes": self.fit.usable_bytes,
            "reserved_bytes": self.reserved_bytes,
            "active_bytes": self.active_bytes,
            "stream_bytes": dict(self.stream_bytes),
            "moments_bytes": {one.name: {term.name: term.num_bytes for term in one.terms} for one in self.moments},
            "seconds": self.seconds,
            "was_kept": self.was_kept,
        }


def traced_memory(job: Job, *, cache_dir: Path | None, timeout_seconds: float = TIMEOUT_SECONDS) -> Traced:
    """Trace `job`, or find the answer kept in `cache_dir` (None: nothing is kept).

    Raises CannotTrace where torch is missing, the process ends without an answer or takes longer than
    `timeout_seconds`, and for what has no trace: compiled blocks, NF4, a reference, and a machine without GPUs.
    """
    _refuse(job)
    started_at = time.monotonic()
    asked = _question(job)
    kept = None if cache_dir is None else cache_dir / f"{_key(asked)}.json"
    answer = _kept_answer(kept)
    was_kept = answer is not None
    if answer is None:
        answer = _ask(asked, timeout_seconds=timeout_seconds)
        if kept is not None:
            _keep(kept, answer)
    moments = tuple(
        Moment(name, tuple(Term(category, num_bytes) for category, num_bytes in terms.items()))
        for name, terms in answer["moments"].items()
    )
    fit = Fit(
        of="a GPU's memory",
        needed_bytes=answer["reserved_bytes"] + OUTSIDE_BYTES,
        # When memory runs out, expandable segments give back what lies free between blocks.
        least_bytes=answer["active_bytes"] + OUTSIDE_BYTES,
        usable_bytes=job.instance.gpu_memory_mib * 2**20 * USABLE_SHARE,
    )
    return Traced(
        moments=moments,
        stream_bytes=answer["stream_bytes"],
        reserved_bytes=answer["reserved_bytes"],
        fit=fit,
        seconds=time.monotonic() - started_at,
        was_kept=was_kept,
    )


def _refuse(job: Job) -> None:
    if job.parallel.compile:
        raise CannotTrace("--compile=1 cannot be traced: what a compiled block keeps is known when it is compiled")
    if job.adapters.bnb_quant_type != "none":
        raise CannotTrace("weights in nf4 are not traced: their kernels are the GPU's own; the closed form counts them")
    if job.learning.objective == "dpo":
        raise CannotTrace("--objective=dpo is not traced; the closed form counts it")
    if not job.has_gpus:
        raise CannotTrace(f"{job.instance.name} has no GPU, and the trace is of a GPU's memory")


def _question(job: Job) -> dict[str, Any]:
    """What the trace depends on, and nothing else."""
    return {
        "model": dataclasses.asdict(job.model),
        "data": {"train_batch_size": job.data.train_batch_size, "document_mask": job.data.document_mask},
        "parallel": dataclasses.asdict(job.parallel),
        "adapters": dataclasses.asdict(job.adapters),
        "num_gpus": job.num_gpus,
        "gpus_per_node": job.instance.num_gpus,
        "accumulation": min(2, job.accumulation),  # later micro-steps meet what the second one met
        "attention_path": job.attention_path,
    }


def _ask(asked: Mapping[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            (sys.executable, "-m", "hypershard.dry_run"),
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CannotTrace(f"the trace took longer than {timeout_seconds:g} s") from None
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-_NUM_LAST_LINES:])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise CannotTrace(f"the trace ended by {how}: {last or 'it said nothing'}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# --- kept answers


def _key(asked: Mapping[str, Any]) -> str:
    """Names a question, the software that answers it, and the code that decides. Raises CannotTrace without torch."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for name in _DISTRIBUTIONS:
        try:
            digest.update(f"{name}={importlib.metadata.version(name)};".encode())
        except importlib.metadata.PackageNotFoundError:
            raise CannotTrace(f"{name} is not installed here, and the trace runs it") from None
    for path in _source_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _source_files() -> Iterator[Path]:
    package = Path(__file__).parents[1]
    for folder in _FOLDERS:
        yield from sorted((package / folder).rglob("*.py"))
    yield from (package / name for name in _FILES)


def _kept_answer(path: Path | None) -> dict[str, Any] | None:
    """None where there is none, or half of one."""
    try:
        answer = None if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _keep(path: Path, answer: Mapping[str, Any]) -> None:
    """A cache that cannot be written costs the next one who asks some seconds, and nobody an answer."""
    with contextlib.suppress(StorageError):
        make_directory(path.parent)
        write_json(path, answer)
