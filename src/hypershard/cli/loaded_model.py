"""A checkpoint's model on one device, to be talked to: its weights are read to where they compute, and held once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.nf4_format import Format
from ..adapters.targets import adapter_specs, adapter_targets, nf4_formats
from ..checkpoint.manifest import StoredCheckpoint
from ..config.schema import AdapterConfig, ModelConfig
from ..errors import CheckpointError
from ..models.family import family_of
from ..plan.here import ram_bytes
from ..plan.serving import need_of
from .checkpoint_adapters import base_folder, base_location, whole_weights
from .checkpoint_merge import Beside, GivenAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..checkpoint.hf_export import Weights

_GIB = 2**30
# Of weights read at a time, or one that is larger: files hold small parts of many side by side, in blocks that are read
# whole. Of small models less.
_READ_BYTES, _READ_SHARE = 2**30, 1 / 8
# What products, logits and the device's libraries take besides weights and cache. A round guess.
_WORK_BYTES = 2**29
_QUANTISED_BYTES = 4  # a weight on its way to NF4


def load_model(
    stored: StoredCheckpoint, *, base: str | None, adapters: Sequence[GivenAdapter], context_tokens: int
) -> Any:
    """The model of a checkpoint, in evaluation: on a GPU in bfloat16, without one on the CPU in float32.

    What a run held in NF4 is held so here too, with its adapters beside it: the very model that was trained. Other
    adapters, and those of `adapters`, are merged. `base` is as of `whole_weights`. Raises CheckpointError when the
    device has no room for it and for `context_tokens` of its cache, before any weight is read; and as `whole_weights`.
    """
    import torch

    from ..parallel.init import materialise

    facts = stored.facts(stored.manifest())
    model = ModelConfig(**facts["model"])
    held = None if facts.get("adapters") is None or adapters else AdapterConfig(**facts["adapters"])
    formats = {} if held is None else nf4_formats(model, held)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hf_model = _built(model, held if formats else None, dtype)
    _refuse_too_large(hf_model, model, formats, context_tokens=context_tokens, device=device)
    materialise(hf_model, parameter_device=device, buffer_device=device)
    if formats:
        _fill_beside_nf4(hf_model, stored, facts, base=base_location(facts, base))
    else:
        _fill(hf_model, whole_weights(stored, base=base, more=adapters), dtype)
    return hf_model.eval()


def _built(model: ModelConfig, in_nf4: AdapterConfig | None, dtype: torch.dtype) -> Any:
    """The model on the meta device, as training builds it: with adapters beside weights in NF4, or plain."""
    from ..adapters.lora import add_adapters
    from ..adapters.nf4_weights import hold_in_nf4

    family = family_of(model.model_type)
    hf_model = family.build(model)
    if in_nf4 is not None:
        add_adapters(hf_model, adapter_targets(model, in_nf4), adapters=in_nf4, frozen_dtype=dtype)
    for parameter in hf_model.parameters():  # adapters too: FSDP2 gathers them in what is computed with
        parameter.data = parameter.data.to(dtype)
    if in_nf4 is not None:
        hold_in_nf4(hf_model, family.matrices(model), double_quant=in_nf4.bnb_double_quant)
    return hf_model


def _refuse_too_large(
    hf_model: nn.Module,
    model: ModelConfig,
    formats: Mapping[str, Format],
    *,
    context_tokens: int,
    device: torch.device,
) -> None:
    """Raise CheckpointError where the device has less memory free than the model needs."""
    sizes = [parameter.nbytes for parameter in hf_model.parameters()]
    asked = dataclasses.replace(family_of(model.model_type).complete(model), max_context_width=context_tokens)
    cache_bytes = need_of(asked, bits=16, num_sequences=1).cache_bytes
    work_bytes = _WORK_BYTES + _QUANTISED_BYTES * max((layout.num_unpacked for layout in formats.values()), default=0)
    if device.type == "cpu":
        cache_bytes *= 2  # float32
        work_bytes += 0 if formats else max(_at_once_bytes(sizes), *sizes)
    needed_bytes = sum(sizes) + cache_bytes + work_bytes
    free_bytes, name = _free(device)
    if needed_bytes <= free_bytes:
        return
    how = "NF4" if formats else "bfloat16" if device.type == "cuda" else "float32"
    raise CheckpointError(
        f"found {free_bytes / _GIB:.1f} GiB free on {name}, expected {needed_bytes / _GIB:.1f} GiB: weights in {how} "
        f"{sum(sizes) / _GIB:.1f}, cached keys and values of {context_tokens} tokens {cache_bytes / _GIB:.1f}, to work "
        f"with {work_bytes / _GIB:.1f}; take a larger GPU, or write the model with `hypershard checkpoint export` and "
        f"let a server of several GPUs, such as vLLM, run it"
    )


def _free(device: torch.device) -> tuple[int, str]:
    """Bytes that can be had on a device, and its name."""
    import torch

    from ..checkpoint.snapshot import available_memory_bytes

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    return min(available_memory_bytes(), ram_bytes()), "the CPU"


def _fill(hf_model: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
    parameters = dict(hf_model.named_parameters())
    for names in _some_at_a_time(parameters):
        tensors = weights.read(names, dtype)
        for name in names:
            parameters[name].data.copy_(tensors.pop(name))


def _at_once_bytes(sizes: Sequence[int]) -> int:
    return min(_READ_BYTES, int(sum(sizes) * _READ_SHARE))


def _some_at_a_time(parameters: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size_bytes, most_bytes = 0, _at_once_bytes([parameter.nbytes for parameter in parameters.values()])
    for name, parameter in parameters.items():
        if names and size_bytes + parameter.nbytes > most_bytes:
            yield names
            names, size_bytes = [], 0
        names.append(name)
        size_bytes += parameter.nbytes
    yield names


def _fill_beside_nf4(hf_model: nn.Module, stored: StoredCheckpoint, facts: Mapping[str, Any], *, base: str) -> None:
    """Quantise the weights of `base` as they are read, and put the checkpoint's adapters beside them.

    Raises CheckpointError where they are not those that the adapters were trained beside.
    """
    import torch

    from ..adapters.nf4_weights import nf4_weights
    from ..checkpoint.hf import load_hf_weights
    from ..checkpoint.hf_export import CheckpointWeights

    model, adapters = ModelConfig(**facts["model"]), AdapterConfig(**facts["adapters"])
    names = [spec.name for spec in family_of(model.model_type).parameters(model)]
    parameters, packed = dict(hf_model.named_parameters()), nf4_weights(hf_model)
    load_hf_weights(base_folder(base), {name: packed.get(name) or parameters[name] for name in names})
    beside = Beside.of_checkpoint(facts)
    for name in names:
        parts = packed[name].parts() if name in packed else (parameters[name],)
        beside.check(name, [part.detach() for part in parts], base=base, adapters=stored.location)
    trained = [spec.name for spec in adapter_specs(adapter_targets(model, adapters))]
    for name, tensor in CheckpointWeights(stored).read(trained, torch.float32).items():
        parameters[name].data.copy_(tensor)
