"""What serving a trained model takes: memory of its weights and of the cached keys and values, on which instances.

Bounds, not a plan: how fast a server is depends on its software. Each step of decoding reads all weights that a token
uses and the whole cache once, so memory's bandwidth bounds it from above (Pope et al. 2022, arXiv:2211.05102, sec. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..catalog.instances import Instance, Price
from ..config.schema import ModelConfig
from .bytes import OUTSIDE_BYTES, TIGHT_FROM, USABLE_SHARE
from .job import sizes_of

_CACHE_BYTES = 2  # of a cached number, bfloat16
# NF4 with double quantisation takes 4.13 bits a weight (QLoRA, arXiv:2305.14314, section 3); int8 and fp8 a byte.
BYTES_PER_WEIGHT = {16: 2.0, 8: 1.0, 4: 0.516}


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that serving takes over all GPUs, and those that one step of decoding reads."""

    weight_bytes: float
    cache_bytes: float
    read_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True)
class Place:
    """An instance that holds the model `num_copies` times, each on `num_gpus` GPUs, the fewest of powers of two.

    `tokens_per_second` is a bound from above, over all copies and their sequences; `price` None: unknown.
    """

    instance: Instance
    num_copies: int
    num_gpus: int
    gpu_bytes: float
    price: Price | None
    tokens_per_second: float

    @property
    def dollars_per_million(self) -> float | None:
        """Of tokens written, at that bound, so from below."""
        return None if self.price is None else self.price.dollars_per_hour / 3600 / self.tokens_per_second * 1e6


def need_of(model: ModelConfig, *, bits: int, num_sequences: int) -> Need:
    """What `num_sequences` sequences of the model's context take at once. `bits` of a weight: 16, 8 or 4.

    Below 16 bits embedding and output head stay in 16. Raises ConfigError while vocab_size is open.
    """
    sizes = sizes_of(model)
    per_weight = BYTES_PER_WEIGHT[bits]
    blocks = sizes.total - sizes.root
    active = max(0, sizes.active - sizes.root)
    width = (model.num_key_value_heads or model.num_heads) * (model.head_width or 0)
    tokens = min(model.max_context_width, model.sliding_window or model.max_context_width)
    cache = 2.0 * model.num_layers * width * tokens * _CACHE_BYTES * num_sequences
    head = 2.0 * (model.vocab_size or 0) * model.hidden_width
    return Need(
        weight_bytes=2.0 * sizes.root + per_weight * blocks,
        cache_bytes=cache,
        # Sequences meet different experts; with many of them all are read.
        read_bytes=head + per_weight * min(blocks, active * num_sequences) + cache,
    )


def places_for(
    need: Need, *, num_sequences: int, heads: int, prices: Sequence[tuple[Instance, Price | None]]
) -> list[Place]:
    """The instances that hold it, the cheapest first and those of unknown price last.

    `heads`: of keys and values, which are dealt out to the GPUs whole.
    """
    found = []
    for instance, price in prices:
        num_gpus = 1
        while num_gpus <= min(instance.num_gpus, heads):
            each = need.total_bytes / num_gpus + OUTSIDE_BYTES
            if each <= TIGHT_FROM * USABLE_SHARE * instance.gpu_memory_mib * 2**20:
                num_copies = instance.num_gpus // num_gpus
                steps_per_second = num_gpus * instance.gpu.memory_tb_per_second * 1e12 / need.read_bytes
                found.append(
                    Place(
                        instance=instance,
                        num_copies=num_copies,
                        num_gpus=num_gpus,
                        gpu_bytes=each,
                        price=price,
                        tokens_per_second=num_copies * num_sequences * steps_per_second,
                    )
                )
                break
            num_gpus *= 2
    return sorted(found, key=lambda one: (one.price is None, one.price.dollars_per_hour if one.price else 0.0))
