"""How fast each tier takes and gives the same bytes, beside the plainest way to move as many."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.memory import NodeSettings, NodeTiers
from hypershard.checkpoint.peers import Peers
from hypershard.checkpoint.restore import restore_newest
from hypershard.checkpoint.slots import Slot
from hypershard.checkpoint.snapshot import Snapshots
from hypershard.checkpoint.stores import open_store
from hypershard.checkpoint.tier import Tier
from hypershard.distributed.env import read_surroundings
from hypershard.distributed.process_group import new_host_group
from hypershard.s3.uri import S3Uri
from hypershard.train.setup import Job

from .case import Bench, Case, digest, local_part
from .stall import host_buffers, take_parts

RUN = "bandwidth"
_LINEAGE = Lineage(1, "bench")


class _Places:
    """The tiers of this part of the benchmark and what they are compared with, on this rank."""

    def __init__(self, case: Case, bench: Bench):
        folder = Path(case.folder)
        self.bench = bench
        self.disk_dir, self.local_dir, self.dcp_dir = folder / "shared", folder / "local", folder / "dcp-last"
        self.raw = folder / f"raw-{bench.ranks.rank}"
        self.in_memory = Path(case.memory_dir) / f"download-{bench.ranks.rank}"
        self.group = new_host_group()
        peers = Peers(new_host_group())
        around = read_surroundings(bench.ranks)
        settings = NodeSettings(Path(case.memory_dir), 0, self.local_dir, 2, around)
        self.nodes = NodeTiers(settings, peers=peers, device=bench.world.device)
        self.memory, self.local = self.nodes.open(RUN)
        self.disk = DurableTier(Place(open_store(str(self.disk_dir))), group=new_host_group())
        self.s3_group = new_host_group()
        self.bucket = case.bucket
        self.s3 = DurableTier(Place(open_store(f"{case.bucket}/tier")), group=self.s3_group) if case.bucket else None


def _transfer() -> tuple[Any, Any, dict[str, str]]:
    """A boto3 client, transfer settings and the checksum as AWS advises for large objects and many connections."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=32, retries={"mode": "standard"}))
    size = 32 * 2**20
    config = TransferConfig(
        multipart_threshold=size, multipart_chunksize=size, max_concurrency=10, preferred_transfer_client="classic"
    )
    return client, config, {"ChecksumAlgorithm": "CRC32C"}


class _Savers:
    """One round's saves. The slot that the memory tier fills is what all others write."""

    def __init__(self, places: _Places, job: Job):
        self._at = places
        self._job = job
        self._parts = take_parts(job)
        self._buffers = host_buffers(self._parts, pinned=places.bench.on_gpu)
        self._facts: Mapping[str, Any] = {}
        self._slot: Slot | None = None
        self._snapshots = Snapshots()
        self._snapshot = self._snapshots.take(job.tensors())
        places.nodes.reserve(self._snapshot, self._facts, num_readers=0)

    def copy(self) -> None:
        for buffer, part in zip(self._buffers, self._parts, strict=True):
            buffer.copy_(part, non_blocking=self._at.bench.on_gpu)

    def stage(self) -> None:
        live = self._snapshots.take(self._job.tensors())
        self._slot, self._snapshot = self._at.nodes.stage(live, lineage=_LINEAGE, start_step=0)
        self._slot.wait()

    def commit(self, step: int) -> None:
        self._at.nodes.commit(self.slot, step, self._facts, _LINEAGE)

    @property
    def slot(self) -> Slot:
        assert self._slot is not None and self._slot.path is not None
        return self._slot

    def write_raw(self) -> None:
        subprocess.run(["cp", str(self.slot.path), str(self._at.raw)], check=True)
        with open(self._at.raw, "rb") as file:
            os.fsync(file.fileno())

    def write_local(self) -> None:
        self._at.nodes.write_local(self.slot)

    def write_to(self, tier: DurableTier, step: int) -> None:
        tier.save(step, self._snapshot, self._facts, _LINEAGE)

    def upload_raw(self) -> None:
        client, config, extra = _transfer()
        uri = S3Uri.parse(f"{self._at.bucket}/raw/{self._at.bench.ranks.rank}")
        client.upload_file(str(self.slot.path), uri.bucket, uri.key, Config=config, ExtraArgs=extra)

    def write_dcp(self) -> None:
        writer = FileSystemWriter(self._at.dcp_dir, thread_count=1)
        dcp.save(self._job.tensors(), storage_writer=writer, process_group=self._at.group)

    def end_round(self) -> None:
        self._at.nodes.release(self.slot)
        self._at.raw.unlink(missing_ok=True)


def measure_saves(case: Case, bench: Bench, job: Job) -> dict[str, Any]:
    """Seconds of each way to write, per round; leaves one checkpoint in every tier, and one of torch's own."""
    places = _Places(case, bench)
    savers = _Savers(places, job)
    seconds: dict[str, list[float]] = {}

    def time_it(name: str, action: Callable[[], Any], *, counts: bool) -> None:
        took = bench.timed(action)
        if counts:
            seconds.setdefault(name, []).append(took)

    for number in range(case.rounds + 1):
        step, counts, is_last = number + 1, number > 0, number == case.rounds
        time_it("copy", savers.copy, counts=counts)
        time_it("memory: copied", savers.stage, counts=counts)
        time_it("memory: summed up", lambda step=step: savers.commit(step), counts=counts)
        time_it("cp + fsync", savers.write_raw, counts=counts)
        time_it("local disk", savers.write_local, counts=counts)
        time_it("shared disk", lambda step=step: savers.write_to(places.disk, step), counts=counts)
        if places.s3 is not None and number >= case.rounds + 1 - case.s3_rounds:
            time_it("boto3 upload_file", savers.upload_raw, counts=True)
            time_it("S3", lambda step=step: savers.write_to(places.s3, step), counts=True)
        savers.end_round()
        if not is_last:
            for tier in filter(None, (places.disk, places.s3)):
                for record in tier.list():
                    tier.delete(record)
        if bench.ranks.is_main:
            os.sync()
    savers.write_dcp()
    # Nothing is kept open, but the blobs stay for the processes that restore them.
    places.nodes.close()
    return {"seconds": seconds, "digest": digest(bench, job.tensors())}


class _Loaders:
    """Ways to read a checkpoint back, into the tensors of a job or, plainly, into memory."""

    def __init__(self, places: _Places, job: Job):
        self._at = places
        self._tensors = job.tensors()
        self._parts = [local_part(tensor) for tensor in self._tensors.values()]
        self._buffers = host_buffers(self._parts, pinned=places.bench.on_gpu)
        files = sorted(places.disk_dir.glob("step-*/*.distcp"))
        self._own = files[places.bench.ranks.rank :: places.bench.world.size]
        self._room = memoryview(bytearray(max((path.stat().st_size for path in self._own), default=0)))

    def copy(self) -> None:
        for buffer, part in zip(self._buffers, self._parts, strict=True):
            part.copy_(buffer)

    def load(self, tier: Tier) -> None:
        found = restore_newest([tier], self._tensors)
        assert found.record is not None, f"{tier.name} has no checkpoint"

    def load_dcp(self) -> None:
        dcp.load(self._tensors, storage_reader=FileSystemReader(self._at.dcp_dir), process_group=self._at.group)

    def read_raw(self) -> None:
        for path in self._own:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(self._room):
                    pass

    def download_raw(self, num_objects: int) -> None:
        client, config, _ = _transfer()
        for rank in range(num_objects)[self._at.bench.ranks.rank :: self._at.bench.world.size]:
            uri = S3Uri.parse(f"{self._at.bucket}/raw/{rank}")
            client.download_file(uri.bucket, uri.key, str(self._at.in_memory), Config=config)

    def spoil(self) -> None:
        for part in self._parts:
            part.zero_()


def measure_loads(case: Case, bench: Bench, job: Job, *, num_saved: int, expected: int) -> dict[str, Any]:
    """Seconds of each way to read what `num_saved` ranks saved, per round; what was loaded is compared with that."""
    places = _Places(case, bench)
    loaders = _Loaders(places, job)
    ways: list[tuple[str, Callable[[], None], bool]] = [
        ("copy", loaders.copy, False),
        ("memory", lambda: loaders.load(places.memory), True),
        ("read", loaders.read_raw, False),
        ("local disk", lambda: loaders.load(places.local), True),
        ("shared disk", lambda: loaders.load(places.disk), True),
        ("dcp.load", loaders.load_dcp, True),
    ]
    slow: list[tuple[str, Callable[[], None], bool]] = []
    if (s3 := places.s3) is not None:
        slow.append(("boto3 download_file", lambda: loaders.download_raw(num_saved), False))
        slow.append(("S3", lambda: loaders.load(s3), True))
    seconds: dict[str, list[float]] = {}
    for number in range(case.rounds + 1):
        with_s3 = number > case.rounds - case.s3_rounds
        for name, action, fills in [*ways, *(slow if with_s3 else [])]:
            loaders.spoil()
            took = bench.timed(action)
            if fills and digest(bench, job.tensors()) != expected:
                raise AssertionError(f"{name} loaded other values than were saved")
            if number:
                seconds.setdefault(name, []).append(took)
    places.nodes.close()
    return {"seconds": seconds}
