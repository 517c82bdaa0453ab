"""Reading checkpoints whole, and taking them from one place to another. Needs no torch.

Every block is compared with its sum on the way, and the manifest, which goes last, is the one that was written when
the checkpoint was saved: a copy is as good as the original, or it is not there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DamagedCheckpoint, StorageError
from ..log import logger
from .hf_folder import TOKENIZER_FILES
from .manifest import Manifest, Place, StoredCheckpoint, find_place, folder_name, stored_checkpoints
from .stores import MANIFEST, RUN_FILE, DiskStore, Store
from .sums import BLOCK_BYTES, FileSum, Source, damage_of, num_blocks, read_verified

# Each file of a bucket is read by several connections at once, so fewer files keep them all busy.
_LOCAL_FILES, _REMOTE_FILES = 4, 2
_BELONGINGS = (("", RUN_FILE), ("", "config.yaml"), *(("tokenizer", name) for name in TOKENIZER_FILES))


class Stopped(Exception):
    """Another part of the same work failed."""


@dataclass(frozen=True)
class Progress:
    """Told of every `advance` in bytes, from any thread; `stop` ends all work that reports to it at its next block."""

    show: Callable[[int], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)

    def advance(self, size_bytes: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self.show(size_bytes)

    def following(self, source: Source) -> Source:
        """The same source, whose reads are reported; what cannot be read is a DamagedCheckpoint."""
        return _Followed(source, self)


@dataclass(frozen=True)
class _Followed:
    source: Source
    progress: Progress

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def parallel_reads(self) -> int:
        return self.source.parallel_reads

    def read(self, offset: int, size_bytes: int) -> Any:
        self.progress.advance(0)
        try:
            content = self.source.read(offset, size_bytes)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.name} is missing") from None
        except OSError as error:  # told apart here from what the place that is written to may refuse
            raise DamagedCheckpoint(f"{self.name} cannot be read: {error.strerror or error}") from error
        self.progress.advance(memoryview(content).nbytes)
        return content


def files_at_once(*stores: Store) -> int:
    return _REMOTE_FILES if any(store.is_remote for store in stores) else _LOCAL_FILES


def in_parallel(tasks: Sequence[Callable[[], None]], *, num_threads: int, progress: Progress) -> None:
    """Do all tasks, or raise the first error that one of them met; the others then stop early."""
    with ThreadPoolExecutor(num_threads) as pool:
        started = [pool.submit(task) for task in tasks]
        try:
            if wait(started, return_when=FIRST_EXCEPTION).not_done:
                raise Stopped
        except BaseException as reason:  # one of them failed, or an interrupt
            progress.stop.set()
            pool.shutdown(cancel_futures=True)
            if not isinstance(reason, Stopped):
                raise
    errors = [error for one in started if not one.cancelled() and (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error


def damage_in(stored: StoredCheckpoint, manifest: Manifest, progress: Progress) -> list[str]:
    """Compare every byte of a checkpoint's files with the manifest, some files at a time. Raises StorageError."""
    damage: list[str] = []

    def check(name: str) -> None:
        source = progress.following(stored.store.source(stored.folder, name))
        if text := stored.wrong_size(manifest, name) or damage_of(source, manifest.files[name]):
            damage.append(text)

    tasks = [partial(check, name) for name in _largest_first(manifest)]
    in_parallel(tasks, num_threads=files_at_once(stored.store), progress=progress)
    return sorted(damage)


def _largest_first(manifest: Manifest) -> list[str]:
    return sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))


# --- to another place ----------------------------------------------------------------------------------------------


def destination_store(text: str) -> Store:
    """The store meant by a DESTINATION: a new or existing folder or prefix, or a run directory with `checkpoints/`."""
    place = find_place(text)
    if place.folder is not None:
        raise CheckpointError(f"DESTINATION {text} names one checkpoint; expected the folder or prefix to hold it")
    return place.store


def existing_at(target: Store, step: int, is_same: Callable[[Manifest], bool]) -> StoredCheckpoint | None:
    """The checkpoint of `step` that is at `target` already, if its manifest says it is the same and sizes are right.

    Raises CheckpointError when another finished checkpoint of that step is there.
    """
    for stored in stored_checkpoints(target):
        if stored.step != step or not stored.is_finished:
            continue
        found = stored.manifest()
        if is_same(found) and not any(stored.wrong_size(found, name) for name in found.files):
            return stored
        raise CheckpointError(
            f"{stored.location} is there already and is not the same (start {found.lineage.generation}, saved "
            f"{found.saved_at}); nothing is copied over it: give another DESTINATION or delete it"
        )
    return None


@contextlib.contextmanager
def new_folder(target: Store, step: int) -> Iterator[str]:
    """A fresh folder for `step`, gone again when the block raises. What was left unfinished of it is replaced."""
    for stored in stored_checkpoints(target):
        if stored.step == step and not stored.is_finished:
            logger.warning(f"{stored.location} was left unfinished and is replaced")
            target.remove(stored.folder)
    folder = folder_name(step, 1)
    target.make(folder)
    try:
        yield folder
    except BaseException:  # an interrupt too: half a copy must not stay
        with contextlib.suppress(StorageError):
            target.remove(folder)
        raise


def copy_checkpoint(
    stored: StoredCheckpoint, manifest: Manifest, target: Store, progress: Progress
) -> StoredCheckpoint:
    """Copy one checkpoint to `target`, its files in parallel, its manifest unchanged and last.

    Raises DamagedCheckpoint when a block is not as saved, StorageError when a place refuses; then nothing stays there.
    """
    content = stored.store.read(stored.folder, MANIFEST)
    with new_folder(target, manifest.step) as folder:

        def copy(name: str) -> None:
            source = progress.following(stored.store.source(stored.folder, name))
            with target.stream(folder, name, seconds=None) as sink:
                for block in read_verified(source, manifest.files[name], whole(manifest.files[name])):
                    sink.write(block)

        tasks = [partial(copy, name) for name in _largest_first(manifest)]
        in_parallel(tasks, num_threads=files_at_once(stored.store, target), progress=progress)
        target.settle(folder)
        target.write(folder, MANIFEST, content, is_new=True)
        copied = next(one for one in stored_checkpoints(target) if one.folder == folder)
        found = copied.manifest()
        wrong = [text for name in manifest.files if (text := copied.wrong_size(manifest, name))]
        if wrong or found != manifest:
            raise DamagedCheckpoint(wrong[0] if wrong else f"{copied.location}: its manifest is not the original's")
    return copied


def whole(file: FileSum) -> list[tuple[int, int]]:
    """A request for each block of a file."""
    starts = (block * BLOCK_BYTES for block in range(num_blocks(file.size_bytes)))
    return [(start, min(BLOCK_BYTES, file.size_bytes - start)) for start in starts]


def copy_belongings(place: Place, target: Store) -> list[str]:
    """Copy what lies beside the checkpoints and is absent at `target`: run id, configuration, tokenizer.

    Returns the names of what was copied.
    """
    copied = []
    for folder, name in _BELONGINGS:
        content = beside(place.store, folder, name)
        if content is None:
            continue
        shown = f"{folder}/{name}" if folder else name
        try:
            found = target.read(folder, name)
        except FileNotFoundError:
            target.write(folder, name, content)
            copied.append(shown)
            continue
        if name == RUN_FILE and found != content:
            logger.warning(f"{target.location} holds checkpoints of another run too: a resume takes the newest of both")
    return copied


def beside(store: Store, folder: str, name: str) -> bytes | None:
    """A small file kept with checkpoints: in their folder or, on a disk, in the run directory above it."""
    with contextlib.suppress(FileNotFoundError):
        return store.read(folder, name)
    if isinstance(store, DiskStore) and name != RUN_FILE:
        with contextlib.suppress(OSError):
            return (store.directory.parent / folder / name).read_bytes()
    return None


def configuration_of(store: Store) -> Path | None:
    """The `config.yaml` of the run whose checkpoints lie in a store on a disk; None when there is none."""
    if not isinstance(store, DiskStore):
        return None
    places = (store.directory, store.directory.parent)
    return next((folder / "config.yaml" for folder in places if (folder / "config.yaml").is_file()), None)
