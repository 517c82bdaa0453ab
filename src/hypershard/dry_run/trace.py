"""One training, built and wrapped as always, run for two steps on tensors without content, its memory recorded."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..config.schema import Config, ModelConfig
from ..data.packing import Batch
from ..distributed.process_group import World
from ..models.family import family_of
from ..optim.adamw import build_adamw
from ..optim.gradients import clip, local_gradients, sum_of_squares
from ..parallel.fsdp import ShardedModule
from ..train.attention import Attention, Segments
from ..train.setup import Job, build_module
from ..train.step import accumulate_gradients
from . import world as fake
from .allocator import NO_LAYER, Event
from .kernels import as_on_a_gpu, workspaces
from .tape import Tape
from .unroll import unroll

_NUM_STEPS = 2  # the second one meets the holes that the first one left, and what FSDP2 makes on first use
_MOST_MICRO_STEPS = 2  # the last one, which meets gradients of another, holds the most
_DOCUMENTS_PER_ROW = 2
# Layers (or periods of them) traced: the first and the last one differ from those between, of which one is repeated and
# is asked to have neighbours that are like it.
_NUM_UNITS, _REPEATED = 5, 2
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

Build = Callable[..., tuple[nn.Module, ShardedModule]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A configuration with its model completed, on so many GPUs, with the attention that a GPU would take."""

    config: Config
    num_gpus: int
    gpus_per_node: int
    accumulation: int
    attention_path: str


@dataclass(frozen=True)
class _Parts:
    """What `accumulate_gradients` asks of a training's parts."""

    world: World
    module: nn.Module
    sharded: ShardedModule
    attention: Attention


class _Attention(Attention):
    """The segments of one batch, worked out before tensors lost their content."""

    def __init__(self, attention: Attention, batch: Batch) -> None:
        super().__init__(attention.path, attention.chunk_tokens)
        object.__setattr__(self, "_segments", attention.segments(batch, fake.DEVICE))

    def segments(self, batch: Batch, device: torch.device) -> dict[str, Segments]:
        return self._segments  # type: ignore[attr-defined, no-any-return]


class _Batch(Batch):
    """A batch whose labels cannot be read."""

    @property
    def num_valid_tokens(self) -> int:
        return self.labels.numel()


def events_of(question: Question, *, build: Build = build_module) -> list[Event]:
    """Everything that rank 0 allocates and frees on its GPU, from the first weight to the end of the second step.

    A few layers are traced and one of them repeated (unroll.py): whole periods, where layers take turns. `build` makes
    the sharded module, as train/setup.py's does. One process can ask for one number of GPUs only.
    """
    model = question.config.model
    period = _period(model)
    num_traced = _NUM_UNITS * period + model.num_layers % period
    if num_traced >= model.num_layers:
        return trace(question, build=build, period=1)[0]
    shallow = dataclasses.replace(model, num_layers=num_traced)
    config = dataclasses.replace(question.config, model=shallow)
    events, owners = trace(dataclasses.replace(question, config=config), build=build, period=period)
    return unroll(events, owners=owners, layer=_REPEATED, more=(model.num_layers - num_traced) // period)


def _period(model: ModelConfig) -> int:
    """After how many layers their kinds come again."""
    kinds = getattr(family_of(model.model_type).hf_config(model), "layer_types", None) or [""] * model.num_layers
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds))))


def trace(question: Question, *, build: Build, period: int) -> tuple[list[Event], dict[int, int]]:
    """The events of all layers as they are, and the layers that blocks outside of layers belong to."""
    config = question.config
    world = fake.start(world_size=question.num_gpus, local_world_size=question.gpus_per_node)
    family = family_of(config.model.model_type)
    packs = config.data.document_mask
    batch = _batch(config, num_documents=_DOCUMENTS_PER_ROW if packs else 1)
    attention = Attention(question.attention_path, family.chunk_tokens(config.model))
    attention = _Attention(attention, batch)
    on_host = config.parallel.cpu_offload
    tape = Tape(workspaces())
    samples = config.data.train_batch_size * question.num_gpus * question.accumulation
    units = [min(layer // period, _NUM_UNITS - 1) for layer in range(config.model.num_layers)]
    owners: dict[int, int] = {}
    with fake.recording(tape, keeps_weights_on_host=on_host), as_on_a_gpu(packs_documents=packs):
        with tape.within("weights"), tape.on_host(on_host):
            module, sharded = build(config, config.model, attention, world, samples_per_step=samples)
        hf_model = cast(Any, module).hf_model
        parameters = dict(hf_model.named_parameters())
        decayed = {spec.name for spec in family.parameters(config.model) if spec.decay}
        with tape.within("optimizer"), tape.on_host(on_host):
            optimizer = build_adamw(parameters, decayed=decayed, optim=config.optim)
        _follow(tape, module, family.blocks(hf_model), units=units)
        parts = cast(Job, _Parts(world, module, sharded, attention))
        batches = [batch] * min(_MOST_MICRO_STEPS, question.accumulation)
        for _ in range(_NUM_STEPS):
            owners |= _owners(tape, parameters, optimizer, units)
            accumulate_gradients(parts, batches)
            owners |= _owners(tape, parameters, optimizer, units)  # FSDP2 pads some weights at their first use
            tape.window, tape.category, tape.layer = "optimizer's step", "other", NO_LAYER
            with tape.on_host(on_host):
                _update(parameters, optimizer, num_replicas=sharded.num_replicas)
        return list(tape.events), owners


def _update(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, *, num_replicas: int) -> None:
    """As train/step.py, which reads the norm in between."""
    gradients = local_gradients(parameters.values())
    norm = sum_of_squares(gradients) / num_replicas
    clip(gradients, norm=2.0, limit=1.0)
    optimizer.step()
    del norm, gradients
    optimizer.zero_grad()


def _batch(config: Config, *, num_documents: int) -> Batch:
    """Rows [B, T] of `num_documents` equal documents each."""
    tokens = config.model.max_context_width
    shape = (config.data.train_batch_size, tokens)
    positions = (torch.arange(tokens) % -(-tokens // num_documents)).expand(shape).contiguous()
    return _Batch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        labels=torch.zeros(shape, dtype=torch.int64),
        position_ids=positions,
    )


# --- where in a step it is


def _follow(tape: Tape, root: nn.Module, blocks: Sequence[nn.Module], *, units: Sequence[int]) -> None:
    """Let `tape` know what runs: before the blocks, which of them forward or backward, the loss, the end of backward.

    `units` says of each block which layer it is told to be.
    """

    def enter(window: str, category: str, layer: int, *_: Any) -> None:
        tape.window, tape.category, tape.layer = window, category, layer

    def enter_first(*arguments: Any) -> None:
        hidden = arguments[1][0]
        if hidden.requires_grad:  # not beside a frozen embedding, where backward ends in the first block (world.py)
            hidden.register_hook(functools.partial(enter, fake.END_OF_BACKWARD, "backward", NO_LAYER))

    def leave(unit: int, is_last: bool, module: nn.Module, _: Any, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        hidden.register_hook(functools.partial(enter, "backward", "backward", unit))
        if is_last:
            enter("loss", "logits", NO_LAYER)

    begin = functools.partial(enter, "before the blocks", "activations", NO_LAYER)
    root.register_forward_pre_hook(begin, prepend=True)
    blocks[0].register_forward_pre_hook(enter_first, prepend=True)
    for block, unit in zip(blocks, units, strict=True):
        run = functools.partial(enter, "forward", "activations", unit)
        block.register_forward_pre_hook(run, prepend=True)
        block.register_forward_hook(functools.partial(leave, unit, block is blocks[-1]), prepend=True)


def _owners(
    tape: Tape, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, units: Sequence[int]
) -> dict[int, int]:
    """The layers that weights and moments belong to, by number of the block they lie in."""
    owners = {}
    for name, parameter in parameters.items():
        found = _LAYER.search(name)
        if found:
            tensors = [parameter, *optimizer.state.get(parameter, {}).values()]
            local = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
            owners.update({tape.block_of(one): units[int(found.group(1))] for one in local})
    return owners
