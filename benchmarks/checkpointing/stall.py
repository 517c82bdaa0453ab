"""How long a save keeps the training thread: every method saves the same tensors, in turn, round after round."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from hypershard.checkpoint.memory_files import claim
from hypershard.checkpoint.snapshot import Snapshots
from hypershard.distributed.process_group import new_host_group
from hypershard.train.setup import Job
from hypershard.train.state import Progress

from . import gpu
from .case import Bench, Case, local_part

PLAIN, SHARED, MEMORY, BOTH = "plain copy", "plain copy to /dev/shm", "memory tier", "memory tier + shared disk"
_PAGE_BYTES = 4096


def _nothing(_: Any) -> None:
    """For methods that are over when their save returns."""


@dataclass(frozen=True)
class Method:
    """One way to save. `save(step)` is what training waits for; `settle` what must be over before weights change;
    `finish` waits until all is written, `clean(step)` removes it."""

    name: str
    save: Callable[[int], Any]
    settle: Callable[[Any], None] = _nothing
    finish: Callable[[Any], None] = _nothing
    clean: Callable[[int], None] = lambda _: None


def host_buffers(parts: Sequence[torch.Tensor], *, pinned: bool) -> list[torch.Tensor]:
    """Warm host memory for `parts`: every page has been touched."""
    return [torch.zeros(part.shape, dtype=part.dtype, pin_memory=pinned).fill_(1) for part in parts]


def _shared_buffers(path: Path, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same in one file of shared memory, which outlives the process."""
    sizes = [-(-part.nbytes // _PAGE_BYTES) * _PAGE_BYTES for part in parts]
    claim(path, sum(sizes))
    memory = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8).fill_(1)
    pieces = zip(memory.split(sizes), parts, strict=True)
    return [piece[: part.nbytes].view(part.dtype).view(part.shape) for piece, part in pieces]


def _copies(name: str, buffers: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], bench: Bench) -> Method:
    def save(_: int) -> None:
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part, non_blocking=bench.on_gpu)
        if bench.on_gpu:
            torch.cuda.synchronize()

    return Method(name, save)


def take_parts(job: Job) -> list[torch.Tensor]:
    return [local_part(tensor) for tensor in job.tensors().values()]


def _tiers(name: str, job: Job, manager: Any, due: Sequence[str]) -> Method:
    def save(step: int) -> None:
        manager.save(step, job.tensors(), job.facts(Progress(step=step)), due=due)

    return Method(name, save, settle=lambda _: manager.settle(), finish=lambda _: manager.finish())


class _ReusedStager:
    """An AsyncStager that keeps its host memory; torch 2.11's own cannot be used twice."""

    should_synchronize_after_execute = False

    def __init__(self) -> None:
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available(), share_memory=True)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._stager.stage(state_dict)

    def synchronize_staging(self) -> None:
        """`stage` returns when all is copied."""

    def close(self) -> None:
        self._stager.close()


class _Torch:
    """torch.distributed.checkpoint, each save into a new directory, over a gloo group of its own."""

    def __init__(self, job: Job, bench: Bench, folder: Path):
        self._job = job
        self._bench = bench
        self._folder = folder
        self._group = new_host_group()

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def clean(self, step: int) -> None:
        if self._bench.ranks.is_main:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def writer(self, step: int, *, fsync: bool = True) -> FileSystemWriter:
        # More than one thread loses I/O errors of all but the first.
        return FileSystemWriter(self.path(step), thread_count=1, sync_files=fsync)

    def sync(self, name: str, *, fsync: bool) -> Method:
        def save(step: int) -> None:
            writer = self.writer(step, fsync=fsync)
            dcp.save(self._job.tensors(), storage_writer=writer, process_group=self._group)

        return Method(name, save, clean=self.clean)

    def background(self, name: str, make: Callable[[int], dict[str, Any]]) -> Method:
        """`make(step)` gives async_save's arguments beside the tensors and the group."""

        def save(step: int) -> Any:
            return dcp.async_save(self._job.tensors(), process_group=self._group, **make(step))

        def settle(answer: Any) -> None:
            if hasattr(answer, "staging_completion"):
                answer.staging_completion.result()

        def finish(answer: Any) -> None:
            getattr(answer, "upload_completion", answer).result()

        return Method(name, save, settle, finish, self.clean)


def _aws(torch_saves: _Torch, bench: Bench, url: str) -> Method:
    """AWS's writer for the memory that HyperPod manages, against a daemon that speaks its protocol."""
    import logging

    from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import SageMakerTieredStorageWriter
    from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig
    from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import SageMakerCheckpointConfig

    # The writer passes no address on to its client, so the default is the only place to set one.
    timeout, retries, backoff = 600.0, 0, 1.5
    InMemoryClientConfig.__init__.__defaults__ = (url, timeout, retries, backoff, False)
    quiet = logging.getLogger("aws-writer")
    quiet.setLevel(logging.ERROR)
    config = SageMakerCheckpointConfig(namespace="bench", world_size=bench.world.size, logger=quiet)
    stager = _ReusedStager()

    def make(step: int) -> dict[str, Any]:
        return {"storage_writer": SageMakerTieredStorageWriter(config, step=step), "async_stager": stager}

    return torch_saves.background("AWS SageMakerTieredStorageWriter, stager reused", make)


def methods(case: Case, bench: Bench, job: Job) -> tuple[list[Method], dict[str, str], Any]:
    """All methods, why those that are missing are, and the manager, to be closed."""
    folder = Path(case.folder)
    manager = bench.manager(
        job, folder / "tiers", in_memory_checkpointing_freq=1, checkpoint_freq=1, keep_checkpoints=1
    )
    parts = take_parts(job)
    shared = Path(case.memory_dir) / f"plain-{bench.ranks.rank}"
    saves = _Torch(job, bench, folder / "dcp")
    thread_stager, process_stager = _ReusedStager(), _ReusedStager()
    process = AsyncCheckpointerType.PROCESS
    found = [
        _copies(PLAIN, host_buffers(parts, pinned=bench.on_gpu), parts, bench),
        _copies(SHARED, _shared_buffers(shared, parts), parts, bench),
        _tiers(MEMORY, job, manager, ["memory"]),
        _tiers(BOTH, job, manager, ["memory", "disk"]),
        saves.background(
            "dcp.async_save thread, stager reused",
            lambda step: {"storage_writer": saves.writer(step), "async_stager": thread_stager},
        ),
        saves.background("dcp.async_save thread, default stager", lambda step: {"checkpoint_id": saves.path(step)}),
        saves.background(
            "dcp.async_save thread, writer as stager", lambda step: {"storage_writer": saves.writer(step)}
        ),
        saves.background(
            "dcp.async_save process, stager reused",
            lambda step: {
                "storage_writer": saves.writer(step),
                "async_stager": process_stager,
                "async_checkpointer_type": process,
            },
        ),
        saves.sync("dcp.save, no fsync", fsync=False),
        saves.sync("dcp.save, fsync", fsync=True),
    ]
    missing = {}
    try:
        if case.daemon_url is None:
            raise ImportError("there is no daemon to talk to")
        found.append(_aws(saves, bench, case.daemon_url))
    except ImportError as error:
        missing["AWS SageMakerTieredStorageWriter"] = str(error)
    return found, missing, manager


def measure(case: Case, bench: Bench, job: Job) -> dict[str, Any]:
    """Per method and round in seconds: a plain copy just before, blocked, waiting to settle, until all was written."""
    ways, missing, manager = methods(case, bench, job)
    plain = ways[0]
    samples: dict[str, list[list[float]]] = {way.name: [] for way in ways}
    for number in range(case.rounds + 1):
        for way in [way for way in ways if way.name not in missing]:
            step = 1 + number * len(ways) + ways.index(way)
            copy_seconds = bench.timed(lambda step=step: plain.save(step))
            times, failure = _one_save(way, step, bench)
            if failure is not None:
                missing[way.name] = failure
            samples[way.name].append([copy_seconds, *bench.slowest(times)])
            way.clean(step)
            if bench.ranks.is_main:
                os.sync()  # what one method left to be written must not slow the next one
    stream = gpu.measure(bench, job, manager, plain.save, case.rounds) if bench.on_gpu else None
    manager.close(is_complete=True)
    Path(case.memory_dir, f"plain-{bench.ranks.rank}").unlink()
    measured = {name: {"first": rows[0], "rounds": rows[1:]} for name, rows in samples.items() if name not in missing}
    return {"stream_seconds": stream, "missing": missing, "methods": measured}


def _one_save(way: Method, step: int, bench: Bench) -> tuple[list[float], str | None]:
    began_at = bench.start_line()
    times = [0.0, 0.0, 0.0]
    failure = None
    try:
        answer = way.save(step)
        saved_at = time.perf_counter()
        way.settle(answer)
        settled_at = time.perf_counter()
        way.finish(answer)
        times = [saved_at - began_at, settled_at - saved_at, time.perf_counter() - began_at]
    except Exception as error:  # of whatever library: that it does not work here is a result too
        failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return times, bench.first_failure(failure)


def parts_of_a_save(bench: Bench, job: Job, rounds: int) -> dict[str, list[float]]:
    """Where the time of a memory save goes beside its copy, in seconds per round."""
    found: dict[str, list[float]] = {"tensors": [], "facts": [], "plan": []}
    tensors, snapshots = job.tensors(), Snapshots()
    snapshots.take(tensors)  # planned once and for all
    for _ in range(rounds):
        found["tensors"].append(bench.timed(job.tensors))
        found["facts"].append(bench.timed(lambda: job.facts(Progress())))
        found["plan"].append(bench.timed(lambda: snapshots.take(tensors)))
    return found
