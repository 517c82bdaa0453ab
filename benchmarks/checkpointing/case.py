"""What the parts of the checkpoint benchmark share: the job they save, and times that hold for all ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hypershard.checkpoint.manager import CheckpointManager
from hypershard.cli.train import build_parser, resolve_arguments
from hypershard.config.schema import CheckpointConfig
from hypershard.distributed.env import read_ranks, read_surroundings
from hypershard.distributed.process_group import World, new_host_group, start
from hypershard.metrics.on_track import Forecast
from hypershard.train.rehearse import rehearse
from hypershard.train.setup import Job, build_job
from hypershard.train.state import Progress
from hypershard.train.tiers import build_checkpoints

# 6.8 M, 97.6 M, 1.24 B and 8.03 B parameters; with AdamW's moments in float32 twelve bytes each.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_width": 256, "num_layers": 6, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768},
    "medium": {"hidden_width": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2048, "vocab_size": 8192},
    "1b": {"model": "llama3_2_1b"},
    "8b": {"model": "llama3_1_8b"},
}
SHAPES["small"]["vocab_size"] = 4096


@dataclass(frozen=True)
class Case:
    """One run of the benchmark. `folder` lies on the disk that is measured, `memory_dir` in shared memory.

    `bucket` is an s3:// URI, `daemon_url` where AWS's memory tier is played; None: not measured.
    """

    ranks: int
    scale: str
    folder: str
    memory_dir: str
    rounds: int
    s3_rounds: int
    train_scale: str
    train_rounds: int
    train_steps: int
    bucket: str | None
    daemon_url: str | None

    @staticmethod
    def read(path: Path) -> Case:
        return Case(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))


class Bench:
    """This rank with its process group, and clocks that all ranks share."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.ranks = read_ranks()
        self.world: World = start(self.ranks)
        self._group = new_host_group()

    @property
    def on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def start_line(self) -> float:
        """Wait until all ranks are here and the GPU is idle; the time then."""
        if self.on_gpu:
            torch.cuda.synchronize()
        dist.barrier(self._group)
        return time.perf_counter()

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Of each of these times the longest over the ranks."""
        times = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, self._group)
        return times.tolist()

    def timed(self, action: Callable[[], Any]) -> float:
        """Seconds of `action`, begun by all ranks at once, on the slowest of them."""
        began_at = self.start_line()
        action()
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.slowest([time.perf_counter() - began_at])[0]

    def sum(self, number: int) -> int:
        total = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        return int(total)

    def first_failure(self, text: str | None) -> str | None:
        """What the first rank with a failure says of it; None when none has one."""
        texts: list[str | None] = [None] * self.world.size
        dist.all_gather_object(texts, text, group=self._group)
        return next((one for one in texts if one is not None), None)

    def build(self, case: Case, scale: str, folder: Path) -> Job:
        """A sharded model with AdamW through the program's own setup, no checkpoint tier on, one step rehearsed."""
        settings: dict[str, Any] = {
            **SHAPES[scale],
            "max_context_width": 2048 if self.on_gpu else 256 if scale == "small" else 64,
            "train_batch_size": 4 if scale == "small" else 1,
            "bf16": int(self.on_gpu),
            "activation_checkpointing": "full" if self.on_gpu else "none",
            "document_mask": 0,
            "max_steps": 10**6,  # never reached: the learning rate hardly changes
            "checkpoint_freq": 0,
            "in_memory_checkpointing_freq": 0,
            "memory_tier_dir": case.memory_dir,
            "num_memory_copies": 0,
        }
        namespace = build_parser().parse_args([f"--{name}={value}" for name, value in settings.items()])
        config = resolve_arguments(namespace)[0].config
        job = build_job(
            config,
            self.world,
            checkpoint_dir=folder,
            surroundings=read_surroundings(self.ranks),
            alarm=_refuse,
            foresee=lambda model, last_step: Forecast(),
        )
        rehearse(job)
        self.checkpoint_config = config.checkpoint
        return job

    def manager(self, job: Job, folder: Path, **changes: Any) -> CheckpointManager:
        """The tiers that a run with these checkpoint settings has, begun after step 0."""
        section: CheckpointConfig = dataclasses.replace(self.checkpoint_config, **changes)
        surroundings = read_surroundings(self.ranks)
        made = build_checkpoints(section, self.world, checkpoint_dir=folder, surroundings=surroundings, alarm=_refuse)
        if made.saves:
            made.begin(0, job.tensors(), job.facts(Progress()))
        return made


def _refuse(text: str) -> None:
    """An alarm means that a save was not made, so its time means nothing."""
    raise RuntimeError(f"a checkpoint failed: {text}")


def fill_randomly(tensors: Mapping[str, torch.Tensor], *, seed: int) -> None:
    """Give every shard random values, so that no zeros are skipped by whoever copies them."""
    generator = torch.Generator(next(iter(tensors.values())).device).manual_seed(seed)
    for tensor in tensors.values():
        local_part(tensor).uniform_(-1, 1, generator=generator)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest(bench: Bench, tensors: Mapping[str, torch.Tensor]) -> int:
    """A sum over the bits of all shards: the same however they are spread over ranks."""
    parts = (local_part(tensor).view(torch.int32) for tensor in tensors.values())
    return bench.sum(sum(int(part.sum(dtype=torch.int64)) for part in parts))
