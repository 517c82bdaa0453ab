"""The machine at hand as an instance to plan for: a row of the catalog, or one made up from what is found."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ..catalog.gpus import Gpu, gpu_by_device_name
from ..catalog.instances import Instance, instances

CPU = "CPU"
# In float32: two fused multiply-adds of 8 numbers a cycle (AVX2) at 2.5 GHz; and a core's part of the memory's. Round
# guesses to start from: coefficients.json holds what a CPU was measured to make of them.
_TFLOPS_PER_CORE = 0.08
_TB_PER_SECOND_PER_CORE = 0.01
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, cgroup 2 and 1


def this_machine(*, instance_type: str, gpu_name: str | None, gpu_memory_mib: int | None, num_ranks: int) -> Instance:
    """This node, of which `num_ranks` GPUs are used, or as many ranks on its cores where `gpu_name` is None.

    `instance_type` is what its cloud calls it, "" for none; a type of the catalog brings its network and prices, if its
    GPU is the one found. Any other is named "here" and has no price. Reads this node's cores and memory.
    """
    gpu = _cpu(num_ranks) if gpu_name is None else gpu_by_device_name(gpu_name) or _unknown(gpu_name, gpu_memory_mib)
    for row in instances():
        if row.name == instance_type and row.gpu == gpu and row.num_gpus >= num_ranks:
            return dataclasses.replace(row, num_gpus=num_ranks)
    gpu_mib = gpu_memory_mib or int(gpu.memory_gib * 1024)
    like = [row for row in instances() if row.gpu == gpu and row.interconnect is not None]
    return Instance(
        name="here",
        gpu=gpu,
        num_gpus=num_ranks,
        gpu_memory_mib=gpu_mib,
        num_vcpus=len(os.sched_getaffinity(0)),
        ram_gib=ram_bytes() // 2**30,
        nvme_gb=0,
        efa_interfaces=0,
        network_gbit_per_second=10.0,  # between nodes; nobody knows
        gpudirect_rdma=False,
        interconnect=like[0].interconnect if like and num_ranks > 1 else None,
        ec2=None,
        sagemaker=None,
    )


def _cpu(num_ranks: int) -> Gpu:
    cores = len(os.sched_getaffinity(0)) / num_ranks
    return Gpu(
        name=CPU,
        pattern="",
        bf16_tflops=_TFLOPS_PER_CORE * cores,
        fp16_tflops=None,
        fp8_tflops=None,
        memory_gib=ram_bytes() / 2**30 / num_ranks,
        memory_tb_per_second=_TB_PER_SECOND_PER_CORE * cores,
        source="a guess",
        date="",
    )


def _unknown(name: str, memory_mib: int | None) -> Gpu:
    return Gpu(
        name=name,
        pattern="",
        bf16_tflops=None,
        fp16_tflops=None,
        fp8_tflops=None,
        memory_gib=(memory_mib or 0) / 1024,
        memory_tb_per_second=1.0,
        source="not in the catalog",
        date="",
    )


def ram_bytes() -> int:
    """This node's memory, or the part of it that this container may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max": no limit
            sizes.append(int(text))
    return min(sizes)
