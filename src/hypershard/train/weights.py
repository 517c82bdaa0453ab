"""The weights a training starts from: drawn from the seed or read, and of adapters what they stand beside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.lora import bit_sums
from ..adapters.nf4_weights import Nf4Weight, nf4_weights
from ..adapters.peft_format import PeftAdapter, load_peft, open_peft
from ..adapters.targets import adapter_specs, adapter_targets
from ..checkpoint.hf import load_hf_weights
from ..config.schema import AdapterConfig, Config, ModelConfig
from ..log import logger
from ..models.family import ParameterSpec, family_of
from ..models.same_config import refuse_other_config
from ..parallel.init import initialise, initialise_part
from .init_from import Origin


@dataclass(frozen=True)
class Base:
    """The frozen weights beside which adapters are trained: where they came from, and what tells them from others.

    `bit_sums` has a number for each weight as it is held, in the order of the family's list (adapters/lora.py).
    """

    init_from: str
    bit_sums: tuple[int, ...]


def first_weights(
    config: Config,
    model: ModelConfig,
    hf_model: nn.Module,
    origin: Origin | None,
    *,
    num_replicas: int,
    device: torch.device,
) -> Base | None:
    """Give a materialised model the weights it starts from; returns what adapters stand beside, if there are any.

    `origin`: what --init_from names; None: 'scratch' or 'resume'. Random numbers are drawn on `device`; `num_replicas`
    ranks hold the same part. Raises ConfigError and CheckpointError for an --init_from or --lora_init_from that holds
    something else.
    """
    family, init_from, seed = family_of(model.model_type), config.train.init_from, config.data.seed
    parameters, packed = dict(hf_model.named_parameters()), nf4_weights(hf_model)
    specs = family.parameters(model)
    plain = [spec for spec in specs if spec.name not in packed]
    if origin is None:
        initialise(parameters, plain, seed=seed, device=device)
        for spec in specs:
            if spec.name in packed:
                _draw_packed(packed[spec.name], spec, seed=seed, device=device)
    else:
        refuse_other_config(family.hf_config(model), origin.local, init_from=init_from)
        load_hf_weights(origin.folder, {spec.name: packed.get(spec.name) or parameters[spec.name] for spec in specs})
    targets = adapter_targets(model, config.adapters)
    if not targets:
        return None
    if init_from == "scratch":
        logger.warning("--lora_r without --init_from: adapters are trained beside random weights, of no use but to try")
    adapter = None
    if config.adapters.lora_init_from is None:
        initialise(parameters, adapter_specs(targets), seed=seed, device=device)
    else:
        adapter = open_peft(config.adapters.lora_init_from, flag="--lora_init_from")
        load_peft(adapter, config.adapters, targets, parameters)
    held = [packed[spec.name].parts() if spec.name in packed else (parameters[spec.name],) for spec in specs]
    base = Base(init_from, bit_sums(held, num_replicas=num_replicas, device=device))
    if adapter is not None:
        _warn_of_another_base(
            adapter, config.adapters, dict(zip((one.name for one in specs), base.bit_sums, strict=True))
        )
    return base


def _warn_of_another_base(adapter: PeftAdapter, adapters: AdapterConfig, bit_sums: dict[str, int]) -> None:
    """Where the adapter says beside which weights it was trained, held as these are."""
    theirs, names = adapter.training.get("bit_sums"), ("bnb_quant_type", "bnb_double_quant")
    is_held_so = all(getattr(adapter.settings, name) == getattr(adapters, name) for name in names)
    if theirs is not None and is_held_so and theirs != bit_sums:
        logger.warning(
            f"--lora_init_from={adapter.location} was trained beside other weights than those of --init_from; it goes "
            f"on beside these"
        )


def _draw_packed(weight: Nf4Weight, spec: ParameterSpec, *, seed: int, device: torch.device) -> None:
    """Quantise what the seed says."""
    for box in weight.boxes():
        values = weight.empty(box)
        initialise_part(values, spec, starts=[span.start for span in box], seed=seed, device=device)
        weight.fill(box, values)
