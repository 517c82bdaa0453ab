"""Seconds of an optimizer step in closed form: a roofline of five kinds of work.

Each kind of work is first put as seconds at the hardware's published peak (`Work`), then multiplied by how many times
longer real kernels take; for the network, by the share of it that computing does not hide. Those factors are fitted on
published speeds (coefficients.json, benchmarks/fit_speeds.py); they are of a generation of software as much as of
hardware, hence the band.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.targets import nf4_formats
from ..catalog.bus_bandwidth import bus_bandwidth
from ..errors import ConfigError
from ..models.family import family_of
from .bytes import saved_by_token
from .job import Job

LEVEL = "closed form"
_PASSES = 3  # over what a block saves: written in forward, read in backward, and its gradient
# Read and written per logit by the loss: the product, logsumexp, exp, and two casts. That of preferences makes logits
# three times, twice without their gradient: about double.
_LOGIT_BYTES = 40
_OPTIMIZER_BYTES = 34  # per parameter: AdamW reads four float32 numbers and writes three; the gather's cast is 6
_UNPACK_BYTES, _UNPACK_BYTES_COMPILED = 14.0, 2.5  # read and written per weight that leaves NF4
_SECOND_RECOMPUTED = 0.5  # of the blocks' matrix products, by --activation_checkpointing=selective


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of one micro-step on one GPU at its peaks, of what is fitted; `network`: collectives beside it."""

    products: float
    attention: float
    memory: float
    logits: float
    network: float

    def seconds(self, factors: Mapping[str, float]) -> float:
        return sum(value * factors[name] for name, value in vars(self).items())


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Seconds of collectives: in each micro-step beside the computing (`hidden`) or in nobody's shadow, and once a
    step, of which half is taken to run beside the last micro-step."""

    hidden: float
    exposed: float
    once: float
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step. `parts` add up to `seconds`; `level` says where these come from; `band` is relative, either
    way."""

    level: str
    seconds: float
    parts: Mapping[str, float]
    tokens: int
    num_gpus: int
    mfu: float
    band: float
    assumptions: tuple[str, ...]

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.num_gpus


@functools.cache
def coefficients() -> dict[str, Any]:
    """The fitted factors and the curves of bandwidth by size."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "coefficients.json").read_text())
    return content


def step_time(job: Job) -> StepTime:
    """The step's time. Raises ConfigError where the GPU's peak is unknown (--bf16=0), naming the flag."""
    factors, band, assumptions = _factors(job)
    work = work_of(job)
    computing = work.seconds(factors)
    talking = communication(job)
    moving = _offload_seconds(job)
    optimizer = _optimizer_seconds(job)
    waiting = max(0.0, talking.hidden - computing) + talking.exposed
    count = job.accumulation
    parts = {
        **{name: count * value * factors[name] for name, value in vars(work).items()},
        "waiting for the network": count * waiting + talking.once,
        "offload": count * moving,
        "optimizer": optimizer,
    }
    seconds = sum(parts.values())
    return StepTime(
        level=LEVEL,
        seconds=seconds,
        parts=parts,
        tokens=job.step_tokens,
        num_gpus=job.num_gpus,
        mfu=job.step_tokens * job.flops.total / (seconds * job.num_gpus * peak_flops(job)),
        band=band,
        assumptions=(*assumptions, *talking.assumptions),
    )


def peak_flops(job: Job) -> float:
    """Dense FLOP/s of one GPU. Raises ConfigError where neither the catalog nor the user knows them."""
    given = job.train.peak_tflops_per_gpu
    if given:
        return given * 1e12
    listed = job.instance.gpu.bf16_tflops
    if listed is None or (job.has_gpus and not job.parallel.bf16):  # the guess of a CPU's peak is for both
        raise ConfigError(
            f"the catalog knows the {job.instance.gpu.name}'s speed in bfloat16 alone, found "
            f"--bf16={int(job.parallel.bf16)}; give --peak_tflops_per_gpu"
        )
    return listed * 1e12


def _factors(job: Job) -> tuple[Mapping[str, float], float, list[str]]:
    """Factors for this GPU, their band, and what is assumed with them."""
    content = coefficients()
    name = job.instance.gpu.name
    entry = next((one for one in content["fitted"].values() if name in one["gpus"]), None)
    if entry is not None:
        return entry["factors"], entry.get("band", content["band"]), entry.get("assumptions", [])
    like = content["like"].get(name, content["like_unknown"])
    borrowed = f"no published speeds of a {name} were fitted: those of {content['fitted'][like]['of']} are taken"
    return content["fitted"][like]["factors"], content["band_borrowed"], [borrowed]


# --- work


def work_of(job: Job) -> Work:
    """Seconds of one micro-step at peak rates: FLOPs over the GPU's peak, bytes over its memory's bandwidth."""
    model, tokens = job.model, job.micro_tokens
    flops = job.flops
    vocab = model.vocab_size or 0
    head = 2.0 * vocab * model.hidden_width
    # Forward of the blocks alone; the loss keeps its gradient and recomputes nothing, but that of preferences.
    whole = family_of(model.model_type).flops_per_token(model, context_tokens=model.max_context_width)
    forward = whole.matmul / 3 - head
    again = recomputed_share(job)
    attended_again = whole.attention / 3 if job.parallel.activation_checkpointing == "full" else 0.0
    # A mask leaves dense attention the whole square; flash attention skips the half that is masked.
    square = 2.0 if job.attention_path == "dense" and job.data.document_mask else 1.0
    peak, bandwidth = peak_flops(job), job.instance.gpu.memory_tb_per_second * 1e12
    recomputed = job.parallel.activation_checkpointing != "none"
    saved = tokens * saved_by_token(job).whole * model.num_layers * (_PASSES + recomputed + job.has_reference)
    return Work(
        products=tokens * (flops.matmul + again * forward + job.has_reference * head) / peak,
        attention=tokens * (flops.attention + attended_again) * square / peak,
        memory=(saved + _unpacked_bytes(job)) / bandwidth,
        logits=tokens * vocab * _LOGIT_BYTES * (1 + job.has_reference) / bandwidth,
        network=communication(job).hidden,
    )


def recomputed_share(job: Job) -> float:
    """Of the blocks' forward, what backward computes again."""
    return {"none": 0.0, "selective": _SECOND_RECOMPUTED, "full": 1.0}[job.parallel.activation_checkpointing]


def _unpacked_bytes(job: Job) -> float:
    """Memory traffic of one micro-step to dequantise: in forward, in backward, and where products are computed again.

    A pass costs its code and its number in bfloat16 where one kernel does it, 14 bytes by parts (adapters/nf4.py).
    """
    passes = 2 + job.has_reference + recomputed_share(job)
    num_bytes = _UNPACK_BYTES_COMPILED if job.parallel.compile else _UNPACK_BYTES
    formats = nf4_formats(job.model, job.adapters)
    return passes * num_bytes * sum(math.prod(layout.shape) for layout in formats.values())


def _optimizer_seconds(job: Job) -> float:
    """AdamW is bound by memory: the GPU's, or with --cpu_offload the host's, shared by the node's ranks."""
    numbers = _OPTIMIZER_BYTES * job.trained.shard(job.shard_degree)
    if job.parallel.cpu_offload:
        return numbers * job.instance.num_gpus / (coefficients()["host_gb_per_second"] * 1e9)
    return numbers / (job.instance.gpu.memory_tb_per_second * 1e12)


def _offload_seconds(job: Job) -> float:
    """Transfers of one micro-step between GPU and host, which nothing here hides."""
    rate = host_bytes_per_second(job)
    activations = 2 * saved_by_token(job).on_host * job.micro_tokens * job.model.num_layers
    if not job.parallel.cpu_offload:
        return activations / rate
    # Shards go to the GPU for forward and for backward, gradients come back: in float32, but what is frozen.
    weights = 3 * 4 * job.trained.shard(job.shard_degree)
    if job.has_adapters:
        weights += 2 * job.gathered.shard(job.shard_degree)
    return (activations + weights) / rate


def host_bytes_per_second(job: Job) -> float:
    """Between one GPU and its host."""
    rates = coefficients()["pcie_gb_per_second"]
    return float(rates.get(job.instance.family, rates["other"])) * 1e9


# --- collectives


def communication(job: Job) -> Communication:
    """Seconds of the collectives of parallel/fsdp.py's table, and what is assumed of the network."""
    layers = job.model.num_layers
    block, root, trained = job.gathered.block, job.gathered.root, job.trained
    degree = job.shard_degree
    nodes = max(1, math.ceil(degree / job.instance.num_gpus))
    rate, assumptions = _bandwidth(job, nodes)

    def gather(num_bytes: float) -> float:
        return _moved(num_bytes, degree, rate * _gather_share(job), nodes)

    def reduce(size: float) -> float:
        return _moved(4.0 * size, degree, rate * _gather_share(job), nodes)

    strategy = job.parallel.sharding_strategy
    replicas = job.num_gpus // degree
    copied, more = 0.0, list[str]()
    if replicas > 1:
        wide, more = _bandwidth(job, job.num_nodes)
        shard = 4.0 * trained.total / degree
        copied = 2 * _moved(shard / layers, replicas, wide, job.num_nodes) * layers
    # Per micro-step: gathered twice (full, hybrid), and once more for a reference; reduced, unless once a step will do
    # (zero1, none).
    gathers = (2 + job.has_reference) * layers * gather(block) if strategy in ("full", "hybrid") else 0.0
    reduces = layers * reduce(trained.block) if strategy in ("full", "hybrid", "zero2") else 0.0
    once = copied
    exposed = gather(root) if strategy in ("full", "hybrid") else 0.0
    exposed += reduce(trained.root) if strategy in ("full", "hybrid", "zero2") else 0.0
    if strategy in ("zero1", "zero2"):
        once += layers * gather(block) + gather(root)
    if strategy == "zero1":
        once += layers * reduce(trained.block) + reduce(trained.root)
    return Communication(
        hidden=gathers + reduces, exposed=exposed, once=once / 2, assumptions=(*dict.fromkeys((*assumptions, *more)),)
    )


def _gather_share(job: Job) -> float:
    """All-gather's bandwidth as a share of all-reduce's, which NVSwitch helps with (NVLS) from the H100 on."""
    link = job.instance.interconnect
    curves = coefficients()["collectives"]
    return float(curves["gather_share_nvls"] if link is not None and link.kind != "NVLink 3" else 1.0)


def _moved(num_bytes: float, degree: int, gb_per_second: float, nodes: int) -> float:
    """Seconds of one pass of `num_bytes` around `degree` ranks."""
    if degree == 1 or not num_bytes:
        return 0.0
    curve = coefficients()["collectives"]["share_by_mib" + ("_one_node" if nodes == 1 else "_nodes")]
    points = [(float(size), share) for size, share in curve.items()]
    return num_bytes * (degree - 1) / degree / (gb_per_second * 1e9 * _interpolated(points, num_bytes / 2**20))


def _interpolated(points: list[tuple[float, float]], size: float) -> float:
    """Between points by the size's logarithm; below the first in proportion to the size: the time stays."""
    if size <= points[0][0]:
        return points[0][1] * size / points[0][0]
    for (low, from_share), (high, to_share) in itertools.pairwise(points):
        if size <= high:
            return from_share + (to_share - from_share) * math.log(size / low) / math.log(high / low)
    return points[-1][1]


def _bandwidth(job: Job, num_nodes: int) -> tuple[float, list[str]]:
    """Bus bandwidth of a large all-reduce in 10^9 bytes a second: measured, or worked out and said so."""
    found = bus_bandwidth(job.instance.name, num_nodes)
    if found is not None:
        return found.gb_per_second, []
    content = coefficients()["collectives"]
    name = job.instance.name
    if num_nodes == 1:
        link = job.instance.interconnect
        rate = content["pcie_bus_gb_per_second"] if link is None else link.gb_per_second * content["wire_share"]
        said = [] if job.instance.num_gpus == 1 else [f"nobody measured collectives in {name}: {rate:g} GB/s is taken"]
        return rate, said
    rate = job.instance.network_gbit_per_second / 8 * content["wire_share"]
    return rate, [f"nobody measured collectives between {name}: {rate:.3g} GB/s of its network is taken"]
