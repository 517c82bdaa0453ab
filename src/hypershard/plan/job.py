"""What is planned: a training's settings on so many nodes, and the model's sizes that all arithmetic starts from."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters.targets import adapter_specs, adapter_targets, nf4_formats, trained_flops
from ..catalog.instances import Instance
from ..config.checks import accumulation_steps, flash_obstacle
from ..config.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    LearningConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from ..models.base import Flops, ParameterSpec, shard_dimension
from ..models.family import family_of
from .here import CPU

_BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of a model: in all, used by one token, outside the blocks, and in the largest block.

    `shapes` counts all tensors by their shapes.
    """

    total: int
    active: int
    root: int
    block: int
    shapes: Mapping[tuple[int, ...], int]

    def shard(self, degree: int) -> int:
        """Numbers that the fullest of `degree` ranks keeps: FSDP2 deals out whole rows, or even parts of experts."""
        total = 0
        for shape, count in self.shapes.items():
            size = shape[shard_dimension(shape, degree)]
            total += count * -(-size // degree) * (math.prod(shape) // size)
        return total


@dataclass(frozen=True)
class Gathered:
    """Bytes of a model's weights as ranks gather them: in all, outside the blocks, and of the largest block.

    `parts`: sizes, and the bytes of what they count.
    """

    parts: tuple[tuple[Sizes, int], ...]

    @property
    def total(self) -> int:
        return sum(sizes.total * item_bytes for sizes, item_bytes in self.parts)

    @property
    def root(self) -> int:
        return sum(sizes.root * item_bytes for sizes, item_bytes in self.parts)

    @property
    def block(self) -> int:
        return sum(sizes.block * item_bytes for sizes, item_bytes in self.parts)

    def shard(self, degree: int) -> int:
        """Bytes of the fullest of `degree` ranks' part."""
        return sum(sizes.shard(degree) * item_bytes for sizes, item_bytes in self.parts)


@functools.lru_cache(maxsize=16)
def _gathered(model: ModelConfig, adapters: AdapterConfig, number_bytes: int) -> Gathered:
    formats, specs = nf4_formats(model, adapters), family_of(model.model_type).parameters(model)
    if not formats:
        return Gathered(((sizes_of(model), number_bytes),))
    # As nf4_modules.py has them: rows of bytes, which ranks share; codes and scales have the same number of rows.
    packed = [
        ParameterSpec(name, (layout.num_rows, layout.code_bytes + layout.scale_bytes), "zeros")
        for name, layout in formats.items()
    ]
    dense = [spec for spec in specs if spec.name not in formats]
    return Gathered(((_sizes(dense), number_bytes), (_sizes(packed), 1)))


@functools.lru_cache(maxsize=16)
def sizes_of(model: ModelConfig) -> Sizes:
    """The sizes of `model`. Raises ConfigError while vocab_size is open."""
    return _sizes(family_of(model.model_type).parameters(model))


@functools.lru_cache(maxsize=16)
def _adapter_sizes(model: ModelConfig, adapters: AdapterConfig) -> Sizes:
    return _sizes(adapter_specs(adapter_targets(model, adapters)))


def _sizes(specs: Sequence[ParameterSpec]) -> Sizes:
    blocks: Counter[str] = Counter()
    shapes: Counter[tuple[int, ...]] = Counter()
    for spec in specs:
        found = _BLOCK.search(spec.name)
        blocks[found.group(1) if found else ""] += spec.numel
        shapes[spec.shape] += 1
    root = blocks.pop("", 0)
    return Sizes(
        total=root + blocks.total(),
        active=round(sum(spec.numel * spec.active_share for spec in specs)),
        root=root,
        block=max(blocks.values()),
        shapes=shapes,
    )


@functools.lru_cache(maxsize=16)
def _flops(model: ModelConfig, adapters: AdapterConfig, has_reference: bool) -> Flops:
    context = model.max_context_width
    return trained_flops(model, adapters, context_tokens=context, has_reference=has_reference)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training on `num_nodes` equal nodes. `model` is completed and its vocabulary known."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    train: TrainConfig
    instance: Instance
    num_nodes: int
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)

    @property
    def has_reference(self) -> bool:
        """Whether each micro-step also runs forward without adapters, as preferences are compared with."""
        return self.learning.objective == "dpo"

    @property
    def flops(self) -> Flops:
        """FLOPs of a trained token at the model's context. Raises ConfigError while vocab_size is open."""
        return _flops(self.model, self.adapters, self.has_reference)

    @property
    def has_adapters(self) -> bool:
        """Whether only adapters are trained, beside weights that are frozen."""
        return self.adapters.lora_r > 0

    @property
    def gathered(self) -> Gathered:
        """Bytes of the model's weights as they are gathered and, where frozen, held; adapters come on top."""
        return _gathered(self.model, self.adapters, self.number_bytes)

    @property
    def num_unpacked(self) -> int:
        """Weights out of NF4 that are held at a time; 0 without it."""
        return max((layout.num_unpacked for layout in nf4_formats(self.model, self.adapters).values()), default=0)

    @property
    def trained(self) -> Sizes:
        """Sizes of what is trained: all weights, or the adapters."""
        return _adapter_sizes(self.model, self.adapters) if self.has_adapters else sizes_of(self.model)

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.instance.num_gpus

    @property
    def has_gpus(self) -> bool:
        """False on a machine whose ranks compute on its cores."""
        return self.instance.gpu.name != CPU

    @property
    def shard_degree(self) -> int:
        """GPUs over which weights, gradients and optimizer are spread; the others hold copies."""
        if self.parallel.sharding_strategy == "none":
            return 1
        if self.parallel.sharding_strategy == "hybrid":
            return self.parallel.hybrid_shard_degree or self.instance.num_gpus
        return self.num_gpus

    @property
    def micro_tokens(self) -> int:
        """Tokens of one GPU in one micro-step."""
        return self.data.train_batch_size * self.model.max_context_width

    @property
    def accumulation(self) -> int:
        """Micro-steps in a step. Raises ConfigError when --global_batch_tokens is no whole number of them."""
        return accumulation_steps(self.data, context_tokens=self.model.max_context_width, world_size=self.num_gpus)

    @property
    def step_tokens(self) -> int:
        """Tokens of all GPUs in one optimizer step."""
        return self.micro_tokens * self.num_gpus * self.accumulation

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in forward and backward."""
        return 2 if self.parallel.bf16 else 4

    @property
    def attention_path(self) -> str:
        """`varlen` or `dense`, as `train/attention.py` will choose; a test holds the two together."""
        if self.parallel.attention != "auto":
            return self.parallel.attention
        wanted = self.data.document_mask and not self.model.attn_pdrop and self.has_gpus
        return "varlen" if wanted and flash_obstacle(self.model, self.parallel) is None else "dense"
