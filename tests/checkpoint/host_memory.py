"""Weights in and out as `python -m tests.checkpoint.host_memory WHAT FOLDER [OUTPUT]`: prints by how much memory grew.

In a process of its own, whose peak is nobody else's.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

from hypershard.checkpoint.hf import load_hf_weights
from hypershard.checkpoint.hf_export import CheckpointWeights, Export, write_here, write_model
from hypershard.checkpoint.hf_folder import CONFIG, read_model_folder
from hypershard.checkpoint.manifest import stored_checkpoints
from hypershard.checkpoint.stores import DiskStore
from hypershard.models.base import shard_dimension

MIB = 2**20
NUM_RANKS = 3
COLUMNS = 1024
LARGE, SMALL = (24 * COLUMNS, COLUMNS), (4 * COLUMNS, COLUMNS)  # of float32: 96 MiB and 16 MiB
SHAPES = {"model.embed_tokens.weight": LARGE} | {f"model.layers.{i}.mlp.up_proj.weight": SMALL for i in range(13)}
WHOLE_BYTES = 4 * sum(math.prod(shape) for shape in SHAPES.values())
MAX_SHARD_BYTES = 2 * 16 * MIB


def value_of(name: str) -> torch.Tensor:
    """Float32 in which every row tells its tensor and its number."""
    rows = torch.arange(SHAPES[name][0], dtype=torch.float32) + list(SHAPES).index(name) * 2**15
    return rows.unsqueeze(1).expand(SHAPES[name]).contiguous()


def memory_bytes(kind: str) -> int:
    """Of this process: VmRSS what is resident, VmHWM the most that was."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def restart_peak() -> int:
    """What is resident from now on counts; returns what is."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def read_share(folder: str) -> dict[str, int]:
    """Read what the second of three ranks holds, in a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    found = read_model_folder(folder)
    before = restart_peak()
    weights: dict[str, DTensor] = {
        name: zeros(shape, device_mesh=mesh, placements=[Shard(shard_dimension(shape, NUM_RANKS))])
        for name, shape in SHAPES.items()
    }
    load_hf_weights(found, weights)
    grown = memory_bytes("VmHWM") - before
    for name, weight in weights.items():
        assert torch.equal(weight.to_local(), value_of(name).chunk(NUM_RANKS)[1]), name
    return {"grown": grown, "share": sum(weight.to_local().nbytes for weight in weights.values())}


def write_out(run_dir: str, output: str) -> dict[str, int]:
    weights = CheckpointWeights(stored_checkpoints(DiskStore(Path(run_dir)))[0])
    export = Export(weights, output, {CONFIG: b"{}"}, torch.float32, MAX_SHARD_BYTES)
    before = restart_peak()
    write_model(export, write_files=write_here)
    return {"grown": memory_bytes("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps({"in": read_share, "out": write_out}[sys.argv[1]](*sys.argv[2:])))
