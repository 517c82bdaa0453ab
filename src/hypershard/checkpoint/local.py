"""Checkpoints on a disk that all ranks share: one directory per save, committed by its manifest.

Every save goes to a directory that was not there before (`step-00000060`, and `step-00000060.2` when that step is
saved again), because writing over a checkpoint could leave new data under an old layout. Nothing is renamed:
until the manifest is written the directory does not count, so there is no moment without a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import CheckpointError, StorageError
from ..log import logger
from ..storage import make_directory, readable_errors, remove_tree, sync_directory, write_bytes, write_json
from ..units import format_bytes
from .manifest import (
    FACTS,
    MANIFEST,
    METADATA,
    FileSum,
    Manifest,
    complete_checkpoints,
    damage_of,
    directory_name,
    is_finished,
    now,
    read_facts,
    read_manifest,
    step_directories,
    sum_file,
    write_manifest,
)
from .metadata import check_same_model, read_metadata, read_tensors
from .peers import Peers
from .snapshot import Snapshot, SnapshotPlanner
from .tier import CheckpointRecord


class LocalTier:
    """Checkpoints in `directory`. `group` is a gloo group of all ranks used for nothing else; None: a process alone."""

    name = "disk"

    def __init__(self, directory: Path, *, group: dist.ProcessGroup | None = None):
        self.directory = directory
        self.peers = Peers(group)

    def at(self, location: Path) -> LocalTier:
        return LocalTier(location, group=self.peers.group)

    def probe(self) -> None:
        """Raise StorageError unless rank 0 can write here and every rank sees what it wrote."""
        path = self.directory / self.peers.on_main(self._write_probe)
        try:
            seen = self.peers.together(path.exists)
        finally:
            if self.peers.is_main:
                path.unlink(missing_ok=True)
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise StorageError(
                f"--checkpoint_dir={self.directory} is not one directory for all ranks: a file that rank 0 wrote is "
                f"not seen by rank(s) {', '.join(map(str, blind))}; expected a disk that all nodes share"
            )

    def _write_probe(self) -> str:
        name = f".probe-{uuid.uuid4().hex}"
        write_bytes(make_directory(self.directory) / name, b"")
        return name

    def save(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any]) -> CheckpointRecord:
        record = self.peers.on_main(lambda: self._new_directory(step))
        directory = Path(record.location)
        try:
            try:
                sums = self.peers.together(lambda: self._write_part(directory, snapshot))
            except StorageError as error:
                # Added here because it differs between ranks, and one failure should read the same on all.
                raise StorageError(f"{error}; {_room(directory, snapshot)}. Older checkpoints are untouched") from error
            self.peers.on_main(lambda: self._commit(record, sums, facts))
        except Exception:  # whatever failed, half a checkpoint must not stay
            self._discard(directory)
            raise
        return record

    def _new_directory(self, step: int) -> CheckpointRecord:
        """A fresh directory for `step`. Torn ones of earlier crashes go first: only one save runs at a time."""
        existing = step_directories(self.directory)
        for torn in [record for record in existing if not is_finished(record)]:
            logger.info(f"removing the unfinished checkpoint {torn.location}")
            remove_tree(Path(torn.location))
        attempt = 1 + max((record.attempt for record in existing if record.step == step), default=0)
        path = make_directory(self.directory) / directory_name(step, attempt)
        with readable_errors(path, "creating"):
            path.mkdir()
        return CheckpointRecord(step, str(path), attempt)

    def _write_part(self, directory: Path, snapshot: Snapshot) -> dict[str, FileSum]:
        """Write this rank's file (and rank 0 the layout) and sum it up. Collective inside torch.

        One writing thread: with more, torch loses the error of a helper thread and calls the save a success.
        No copy-ahead: it would use CUDA streams in this thread, for values that are in host memory already.
        """
        writer = _PlainWriter(
            directory, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0
        )
        try:
            with _no_warning_about_one_process(self.peers):
                dcp.save(
                    {},
                    storage_writer=writer,
                    planner=SnapshotPlanner(snapshot),
                    process_group=self.peers.group,
                    no_dist=self.peers.group is None,
                )
        except CheckpointException as error:  # a BaseException, raised on all ranks alike
            raise _one_sentence(error, directory) from error
        return {path.name: sum_file(path) for path in sorted(directory.glob(f"__{self.peers.rank}_*"))}

    def _commit(self, record: CheckpointRecord, sums: list[dict[str, FileSum]], facts: Mapping[str, Any]) -> None:
        directory = Path(record.location)
        write_json(directory / FACTS, {**facts, "step": record.step})
        with readable_errors(directory, "reading"):
            files = {name: file for part in sums for name, file in part.items()}
            files |= {name: sum_file(directory / name) for name in (METADATA, FACTS)}
        manifest = Manifest(record.step, now(), self.peers.size, str(torch.__version__), files)
        with readable_errors(directory, "writing"):
            sync_directory(directory)
            sync_directory(directory.parent)
        write_manifest(directory, manifest)

    def _discard(self, directory: Path) -> None:
        if self.peers.is_main:
            with contextlib.suppress(OSError, StorageError):  # the error that made it useless is on its way
                self._delete(directory)

    def list(self) -> list[CheckpointRecord]:
        return self.peers.on_main(lambda: complete_checkpoints(self.directory))

    def verify(self, record: CheckpointRecord) -> None:
        """Read every byte once, the files spread over the ranks; then the layout, which must be one."""
        directory = Path(record.location)
        manifest = self.peers.on_main(lambda: read_manifest(directory))
        by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
        own = by_size[self.peers.rank :: self.peers.size]
        damage = self.peers.together(
            lambda: [text for name in own if (text := damage_of(directory / name, manifest.files[name]))]
        )
        found = [text for part in damage for text in part]
        if found:
            raise CheckpointError("; ".join(found))

        def read_small_files() -> None:
            read_metadata(directory, files=manifest.files)
            read_facts(directory)

        self.peers.on_main(read_small_files)

    def load(self, record: CheckpointRecord, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        directory = Path(record.location)

        def read() -> None:
            metadata = read_metadata(directory, files=read_manifest(directory).files)
            check_same_model(directory, metadata, tensors)
            read_tensors(directory, metadata, tensors)

        self.peers.together(read)
        return self.peers.on_main(lambda: read_facts(directory))

    def delete(self, record: CheckpointRecord) -> None:
        self.peers.on_main(lambda: self._delete(Path(record.location)))

    def _delete(self, directory: Path) -> None:
        with readable_errors(directory, "deleting"):
            (directory / MANIFEST).unlink(missing_ok=True)
            sync_directory(directory)
        remove_tree(directory)


class _PlainWriter(FileSystemWriter):
    """Lets the operating system's refusal through: torch's zip writer hides it behind an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            refusal = _os_error_behind(error)
            if refusal is None:
                raise
            raise refusal from error


def _os_error_behind(error: BaseException) -> OSError | None:
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def _one_sentence(error: CheckpointException, directory: Path) -> StorageError | CheckpointError:
    """What torch reports as a dictionary of tracebacks, the same on every rank."""
    causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    ranks = ", ".join(map(str, causes))
    texts = "; ".join(dict.fromkeys(_first_line(cause) for cause in causes.values()))
    # A refused write is an OSError, or a RuntimeError of torch's own stream writer.
    refused = any(isinstance(cause, OSError | RuntimeError) for cause in causes.values())
    kind = StorageError if refused else CheckpointError
    return kind(f"saving {directory} failed on rank(s) {ranks}: {texts}")


def _room(directory: Path, snapshot: Snapshot) -> str:
    """Before the partial files are removed: how much room there is, and how much a rank needs."""
    try:
        free_bytes = shutil.disk_usage(directory.parent).free
    except OSError:
        return f"check --checkpoint_dir={directory.parent}"
    return (
        f"{free_bytes} bytes ({format_bytes(free_bytes)}) are free in {directory.parent} and this rank writes about "
        f"{format_bytes(snapshot.size_bytes)}; free some space or choose another --checkpoint_dir"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


@contextlib.contextmanager
def _no_warning_about_one_process(peers: Peers) -> Iterator[None]:
    """A process without a group is meant to save alone; torch would warn each time."""
    if peers.group is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
