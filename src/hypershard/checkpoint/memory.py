"""The tiers on the nodes themselves: memory slots, copies of them in other nodes' memory, files on node-local disks.

Nothing here is collective while training: each rank commits its own blob, and its node's agent hands copies to other
nodes. A save may begin only when every rank's lane to the tiers is idle (the training step's all-reduce carries
that), so the save before the one being written is always whole everywhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distributed.env import Surroundings
from ..errors import HypershardError, StorageError
from ..storage import make_directory, readable_errors, sync_directory
from ..units import format_bytes
from .agent_client import AgentAddress, AgentClient, ensure_agent
from .blob import HEAD_BYTES, BlobTable, Item, blob_bytes, table_bytes
from .blob_tier import HyperPodTier, NodeBlobTier
from .hyperpod import HyperPodMemory
from .lineage import NO_LINEAGE, Lineage
from .manifest import now
from .memory_files import COPIES, OWN, job_root, rank_folder, scan
from .nodes import Nodes, join_nodes
from .peers import Peers
from .ring import copy_nodes
from .slots import Slot, SlotPool, existing_slots, payload_bytes, slot_bytes
from .snapshot import Snapshot, available_memory_bytes, boxes_digest
from .sums import FileSum
from .tier import Tier

_AGENT_SECONDS = 10.0  # without a sign of life from an agent; at work it gives one every two seconds
_PIECE_BYTES = 8 * 2**20  # of one write to a file; ext4 takes a gigabyte at once several times slower
_HYPERPOD_SECONDS = 30.0  # for a request to HyperPod's daemon, besides the time its bytes take
_NUM_COPY_SLOTS = 2  # a whole one while the next is being received
# Saves after which nothing of an earlier start can be needed: the newest one and the one before it are whole.
_SETTLED_SAVES = 3


@dataclass(frozen=True)
class NodeSettings:
    """`memory_dir` None: slots are anonymous memory that dies with the process and is no tier, only staging.

    `num_copies` counts the other nodes that keep each blob. `local_dir` None: no tier on node-local disks.
    `hyperpod_url` None: HyperPod's daemon is left alone; "": it is at the address it has in every cluster.
    """

    memory_dir: Path | None
    num_copies: int
    local_dir: Path | None
    keep_local: int
    around: Surroundings
    hyperpod_url: str | None = None


@dataclass(frozen=True)
class _Layout:
    """What stays the same from save to save: this rank's boxes and which part of the whole they are."""

    items: list[Item]
    part: int
    num_parts: int


class NodeTiers:
    """This rank's view of the tiers on the nodes of a run. `peers` is used from the training thread alone."""

    def __init__(self, settings: NodeSettings, *, peers: Peers, device: torch.device):
        self._settings = settings
        self._peers = peers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._run = ""
        self._roots: tuple[Path | None, Path | None] = (None, None)
        self._nodes: Nodes | None = None
        self._pool: SlotPool | None = None
        self._layout: _Layout | None = None
        self._client: AgentClient | None = None
        self._hyperpod: HyperPodMemory | None = None
        self._targets: list[AgentAddress] = []
        self._num_saves = self._num_local_saves = 0

    # --- before training -------------------------------------------------------------------------------------

    def open(self, run: str) -> list[Tier]:
        """Find this run's blobs, with agents on jobs of several nodes; tiers to restore from, nearest first."""
        settings = self._settings
        if run != self._run:
            self.close()
            self._run = run
            self._hyperpod = self._reach_hyperpod(run)
            made = self._peers.together(lambda: self._make_roots(run))
            self._roots = made[self._peers.rank]
            memory_root, local_root = self._roots
            meeting_place = memory_root or local_root
            if meeting_place is not None:
                self._nodes = join_nodes(self._peers, meeting_place, disk_root=local_root, around=settings.around)
        tiers: list[Tier] = []
        for name, kind, root in zip(("memory", "local"), ("memory", "disk"), self._roots, strict=True):
            if root is not None and self._nodes is not None:
                tiers.append(NodeBlobTier(name, root, kind=kind, job=run, nodes=self._nodes, peers=self._peers))
        if self._hyperpod is not None:
            tiers.insert(len(tiers) and 1, HyperPodTier(self._hyperpod, peers=self._peers))
        return tiers

    def _reach_hyperpod(self, run: str) -> HyperPodMemory | None:
        url = self._settings.hyperpod_url
        return None if url is None else HyperPodMemory(run, url=url, timeout_seconds=_HYPERPOD_SECONDS)

    def _make_roots(self, run: str) -> tuple[Path | None, Path | None]:
        settings = self._settings
        memory = None if settings.memory_dir is None else job_root(make_directory(settings.memory_dir), run)
        local = None if settings.local_dir is None else job_root(make_directory(settings.local_dir), run)
        return memory, local

    def reserve(self, snapshot: Snapshot, facts: Mapping[str, Any], *, num_readers: int) -> None:
        """Claim all memory that saves will need. Collective.

        `num_readers` counts the tiers that may be reading a slot while another save comes. Raises StorageError with
        figures when a node has too little.
        """
        items = snapshot.items()
        digests = self._peers.together(lambda: boxes_digest(snapshot))
        distinct = list(dict.fromkeys(digests))
        self._layout = _Layout(items, distinct.index(digests[self._peers.rank]), len(distinct))
        empty = BlobTable("", NO_LINEAGE, 0, 0, 1, 0, 1, now(), facts, tuple(items), FileSum(0, ()))
        size = slot_bytes(items, num_table_bytes=len(table_bytes(empty)) + 12 * (snapshot.size_bytes // 2**25 + 1))
        memory_root = self._roots[0]
        is_tier = memory_root is not None
        # As a tier: the newest whole one, and the one being written.
        num_slots = num_readers + 2 if is_tier else max(num_readers, 1)
        folder = None
        if memory_root is not None:
            folder = make_directory(rank_folder(memory_root, OWN, self._peers.rank))
        sizes = self._check_budget(folder, num_slots=num_slots, size_bytes=size)

        def claim() -> SlotPool:
            return SlotPool(
                folder, num_slots=num_slots, size_bytes=size, num_kept=int(is_tier), on_gpu=self._stream is not None
            )

        pool: list[SlotPool] = []
        self._peers.together(lambda: pool.append(claim()))
        self._pool = pool[0]
        self._reserve_copies(sizes)

    def _check_budget(self, folder: Path | None, *, num_slots: int, size_bytes: int) -> list[int]:
        """Compare what all ranks of each node will claim with what the node has; returns each rank's size of a slot."""
        found = len(existing_slots(folder, size_bytes)[:num_slots]) if folder is not None else 0
        sizes = self._peers.together(lambda: (size_bytes, (num_slots - found) * size_bytes))
        nodes, memory_root = self._nodes, self._roots[0]
        own_ranks = nodes.ranks[nodes.own] if nodes is not None else [self._peers.rank]
        own_bytes = sum(sizes[rank][1] for rank in own_ranks)
        copies_bytes = sum(_NUM_COPY_SLOTS * sizes[rank][0] for rank in self._copied_here())

        def check() -> None:
            held = sum(path.stat().st_size for path in (memory_root / COPIES).glob("*/*")) if memory_root else 0
            free_bytes, where = available_memory_bytes(), "memory"
            if memory_root is not None and (free := shutil.disk_usage(memory_root).free) < free_bytes:
                free_bytes, where = free, str(self._settings.memory_dir)
            expected_bytes = own_bytes + max(0, copies_bytes - held)
            if expected_bytes <= free_bytes:
                return
            others = f", and {format_bytes(copies_bytes)} for copies of other nodes' ranks" if copies_bytes else ""
            advice = (
                "--async_checkpointing=0, which writes without a copy"
                if memory_root is None
                else "--in_memory_checkpointing_freq=0 to go without checkpoints in memory, lower "
                "--num_memory_copies, or (containers) give more shared memory by --shm-size"
            )
            raise StorageError(
                f"found {format_bytes(free_bytes)} free in {where}, expected {format_bytes(expected_bytes)}: "
                f"{num_slots} copies of every rank's tensors, {format_bytes(own_bytes)} on this node{others}; "
                f"set {advice}"
            )

        self._peers.together(check)
        return [size for size, _ in sizes]

    def _copied_here(self) -> list[int]:
        """Ranks whose copies this node keeps."""
        nodes = self._nodes
        if nodes is None or nodes.num_nodes == 1 or self._roots[0] is None:
            return []
        keepers = [copy_nodes(nodes.domains, node, self._settings.num_copies) for node in range(nodes.num_nodes)]
        return [rank for node, ranks in enumerate(nodes.ranks) if nodes.own in keepers[node] for rank in ranks]

    def _reserve_copies(self, sizes: list[int]) -> None:
        nodes = self._nodes
        if nodes is None or nodes.num_nodes == 1 or self._roots[0] is None:
            return
        self._client = AgentClient(nodes.agents[nodes.own], timeout_seconds=_AGENT_SECONDS)
        self._targets = [nodes.agents[node] for node in copy_nodes(nodes.domains, nodes.own, self._settings.num_copies)]
        client, kept = self._client, {rank: sizes[rank] for rank in self._copied_here()}
        self._peers.together(lambda: client.reserve(kept) if nodes.is_leader else None)

    def forget(self, *, is_over: bool = False) -> None:
        """Delete all blobs of the open run, which starts anew; with `is_over` all else of it too. Collective."""
        self._pool = None
        nodes, roots = self._nodes, [root for root in self._roots if root is not None]

        def remove() -> None:
            if nodes is not None and nodes.is_leader:
                if is_over and nodes.agents:
                    with contextlib.suppress(HypershardError):  # it is gone already
                        AgentClient(nodes.agents[nodes.own]).stop()
                for folder in roots if is_over else [root / kind for root in roots for kind in (OWN, COPIES)]:
                    shutil.rmtree(folder, ignore_errors=True)
            if self._hyperpod is not None and self._peers.is_main:
                with contextlib.suppress(HypershardError):  # it drops what is old by itself
                    self._hyperpod.forget()

        self._peers.together(remove)

    # --- while training --------------------------------------------------------------------------------------

    def stage(self, snapshot: Snapshot, *, lineage: Lineage, start_step: int) -> tuple[Slot, Snapshot]:
        """Copy a snapshot into a slot, pinned once for the caller. On a GPU the copy is only begun: see `Slot.wait`."""
        assert self._pool is not None and self._layout is not None

        def is_abandoned(table: BlobTable) -> bool:
            return table.lineage < lineage and table.step > start_step

        slot = self._pool.take(is_abandoned=is_abandoned)
        return slot, slot.copy(snapshot, self._layout.items, self._stream)

    def commit(self, slot: Slot, step: int, facts: Mapping[str, Any], lineage: Lineage) -> None:
        """Make the slot a blob, which survives this process from here on."""
        layout, peers = self._layout, self._peers
        assert layout is not None

        def table(payload: FileSum) -> BlobTable:
            items = tuple(layout.items)
            numbers = (peers.rank, peers.size, layout.part, layout.num_parts)
            return BlobTable(self._run, lineage, step, *numbers, now(), facts, items, payload)

        slot.commit(payload_bytes(layout.items), table)

    def spread(self, slot: Slot) -> list[str]:
        """Hand the slot's blob to the nodes that keep copies, and to HyperPod's daemon. Returns what went wrong."""
        return [*self._to_nodes(slot), *self._to_hyperpod(slot)]

    def _to_hyperpod(self, slot: Slot) -> list[str]:
        if self._hyperpod is None or slot.table is None:
            return []
        try:
            self._hyperpod.put(memoryview(slot.memory), slot.table)
        except StorageError as error:
            return [f"not in HyperPod's memory: {error}"]
        return []

    def _to_nodes(self, slot: Slot) -> list[str]:
        memory_root, nodes = self._roots[0], self._nodes
        if self._client is None or not self._targets or slot.path is None or memory_root is None or nodes is None:
            return []
        path = str(slot.path.relative_to(memory_root))
        try:
            try:
                answers = self._client.replicate(path, self._targets)
            except HypershardError:  # it was killed: its successor takes over its address
                ensure_agent(
                    memory_root,
                    disk_root=self._roots[1],
                    host=nodes.agents[nodes.own].host,
                    watch_pid=self._settings.around.launcher_pid,
                )
                answers = self._client.replicate(path, self._targets)
        except HypershardError as error:
            return [f"no copy in another node's memory: {error}"]
        pairs = zip(self._targets, answers, strict=True)
        return [f"no copy in the memory of {target.host}: {text}" for target, text in pairs if text is not None]

    def write_local(self, slot: Slot) -> None:
        """Write the slot's blob to the node-local disk, and delete what that makes superfluous."""
        root, table = self._roots[1], slot.table
        assert root is not None and table is not None
        folder = make_directory(rank_folder(root, OWN, table.rank))
        path = folder / f"step-{table.step:08d}.blob"
        temporary = folder / f".{path.name}.tmp"
        size = blob_bytes(bytes(slot.memory[:HEAD_BYTES]))
        assert size is not None
        try:
            with readable_errors(path, "writing"), open(temporary, "wb", buffering=0) as file:
                view = memoryview(slot.memory)[:size]
                while view.nbytes:
                    view = view[file.write(view[:_PIECE_BYTES]) :]
                os.fsync(file.fileno())
            with readable_errors(path, "writing"):
                temporary.replace(path)
                sync_directory(folder)
        finally:
            temporary.unlink(missing_ok=True)
        held = [(other.lineage, other.step, found) for found, other in scan(root) if other.rank == table.rank]
        current = sorted((one for one in held if one[0] == table.lineage), reverse=True)
        # Of earlier timelines nothing is needed once this one has as many as are kept.
        superfluous = current[self._settings.keep_local :]
        if len(current) >= self._settings.keep_local:
            superfluous += [one for one in held if one[0] < table.lineage]
        for _, _, found in superfluous:
            found.unlink(missing_ok=True)
        self._num_local_saves += 1
        if self._num_local_saves == _SETTLED_SAVES:
            self._drop_other_ranks(root)

    def count_save(self) -> None:
        """After some saves, give back memory that only an earlier start used (other ranks, other sizes)."""
        self._num_saves += 1
        memory_root = self._roots[0]
        if self._num_saves != _SETTLED_SAVES or memory_root is None or self._pool is None:
            return
        in_use = {slot.path for slot in self._pool.slots}
        for path in rank_folder(memory_root, OWN, self._peers.rank).glob("slot-*"):
            if path not in in_use:
                path.unlink(missing_ok=True)
        self._drop_other_ranks(memory_root)

    def _drop_other_ranks(self, root: Path) -> None:
        """Delete below `root` what belongs to ranks that this node neither runs nor keeps copies of any more."""
        nodes = self._nodes
        if nodes is None or not nodes.is_leader:
            return
        needed = {rank_folder(root, OWN, rank) for rank in nodes.ranks[nodes.own]}
        needed |= {rank_folder(root, COPIES, rank) for rank in self._copied_here()}
        for folder in root.glob("*/rank-*"):
            if folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def release(self, slot: Slot) -> None:
        assert self._pool is not None
        self._pool.release(slot)

    def pin(self, slot: Slot) -> None:
        assert self._pool is not None
        self._pool.pin(slot)

    # --- after training --------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._client is not None:
            with contextlib.suppress(HypershardError):
                self._client.close()
        self._client, self._targets = None, []
