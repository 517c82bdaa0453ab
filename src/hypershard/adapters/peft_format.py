"""Adapters as the PEFT library keeps them: `adapter_model.safetensors` and `adapter_config.json` (0.19 to 0.21).

| ours | PEFT's |
|---|---|
| `model.layers.0.self_attn.q_proj.lora_A` [r, in] | `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` |
| experts, [E, out, in]: A [E, r, in] | `lora_A.weight` [E*r, in], an expert after another |
| B [E, out, r] | `lora_B.weight` [out, r*E], the expert changing fastest |

Experts kept as [E, in, out] (Llama 4's) have the two roles changed in PEFT, which takes any tensor's last dimension for
its inputs. Adapters of one module's tensors are nested: all but the last of them, in the module's order, stand in a
`.base_layer` more than the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.schema import AdapterConfig
from ..distributed.mesh import local_part
from ..errors import CheckpointError, ConfigError
from ..storage import readable_errors, write_json
from .targets import Target

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_AFTER_LAYER = re.compile(r"\.(?:layers|h)\.\d+\.(.+)$")
# Settings of PEFT's that change what the same matrices mean, and that nothing here computes.
_UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class _Stored:
    """Where PEFT keeps a target's two matrices."""

    target: Target
    module: str

    @property
    def key_a(self) -> str:
        return f"base_model.model.{self.module}.lora_A.weight"

    @property
    def key_b(self) -> str:
        return f"base_model.model.{self.module}.lora_B.weight"


def _stored(targets: Sequence[Target]) -> list[_Stored]:
    experts: dict[str, list[Target]] = {}
    for target in targets:
        if target.matrix.num_experts is not None:
            experts.setdefault(target.matrix.name.rpartition(".")[0], []).append(target)
    found = []
    for target in targets:
        module = target.matrix.name
        if target.matrix.num_experts is not None:
            module = module.rpartition(".")[0]
            siblings = experts[module]
            module += ".base_layer" * (len(siblings) - 1 - siblings.index(target))
        found.append(_Stored(target, module))
    return found


def _to_peft(target: Target, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if target.matrix.num_experts is None:
        return a, b
    if target.matrix.inputs_first:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _from_peft(target: Target, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts = target.matrix.num_experts
    if num_experts is None:
        return a, b
    a, b = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    return (b.transpose(1, 2), a.transpose(1, 2)) if target.matrix.inputs_first else (a, b)


def _meta(target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(target.a.shape, device="meta"), torch.empty(target.b.shape, device="meta")


def save_peft(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    targets: Sequence[Target],
    *,
    adapters: AdapterConfig,
    base: str | None,
) -> None:
    """Write the adapters (by our names, whole) into `folder`, which exists. `base`: the model's folder or hub name.

    Raises StorageError.
    """
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    for one in _stored(targets):
        a, b = _to_peft(one.target, tensors[one.target.a.name], tensors[one.target.b.name])
        # Copies, because safetensors refuses tensors that share memory or leave gaps.
        stored |= {one.key_a: a.clone(memory_format=torch.contiguous_format)}
        stored |= {one.key_b: b.clone(memory_format=torch.contiguous_format)}
    with readable_errors(folder / _WEIGHTS, "writing"):
        save_file(stored, folder / _WEIGHTS, metadata={"format": "pt"})
    write_json(folder / _CONFIG, _config(targets, adapters, base))


def _config(targets: Sequence[Target], adapters: AdapterConfig, base: str | None) -> dict[str, Any]:
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for target in targets:
        match = _AFTER_LAYER.search(target.matrix.name)
        assert match is not None, target.matrix.name
        names[target.matrix.num_experts is not None].add(match.group(1))
    has_experts = bool(names[True])
    alpha = adapters.lora_alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(one.matrix.inputs_first for one in targets if one.matrix.num_experts is None),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        # It acts in training alone, and PEFT refuses it where experts have adapters.
        "lora_dropout": 0.0 if has_experts else adapters.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapters.lora_r,
        "rank_pattern": {},
        "target_modules": sorted(names[False]),
        "target_parameters": sorted(names[True]) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapters.lora_rslora,
    }


def read_peft(folder: Path, adapters: AdapterConfig, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
    """The adapters in `folder` by our names, float32, on the host.

    Raises ConfigError where its settings are not those of `adapters`, CheckpointError where its matrices are not those
    of `targets`.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / _CONFIG).read_bytes())
        stored = load_file(folder / _WEIGHTS)
    except Exception as error:  # safetensors has errors of its own
        raise CheckpointError(
            f"{folder} cannot be read as an adapter in PEFT's format: {type(error).__name__}: {error}; expected a "
            f"folder with {_CONFIG} and {_WEIGHTS}"
        ) from error
    _check_config(folder, config, adapters)
    found: dict[str, torch.Tensor] = {}
    wrong = []
    for one in _stored(targets):
        expected = _to_peft(one.target, *_meta(one.target))
        for key, meta in zip((one.key_a, one.key_b), expected, strict=True):
            if key not in stored or stored[key].shape != meta.shape:
                shape = tuple(stored[key].shape) if key in stored else "nothing"
                wrong.append(f"{key}: found {shape}, expected {tuple(meta.shape)}")
        if not wrong:
            a, b = _from_peft(one.target, stored.pop(one.key_a).float(), stored.pop(one.key_b).float())
            found |= {one.target.a.name: a, one.target.b.name: b}
    # What was asked for is taken out by now.
    wrong = wrong or [f"{key}: found in the folder, not among the weights that get adapters" for key in stored]
    if wrong:
        more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise CheckpointError(
            f"{folder} holds other adapters: {'; '.join(wrong[:_NAMES_SHOWN])}{more}. Give --lora_targets and --lora_r "
            f"as in its {_CONFIG}"
        )
    return found


def _check_config(folder: Path, config: Mapping[str, Any], adapters: AdapterConfig) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder}: its {_CONFIG} describes no LoRA adapter (peft_type LORA)")
    if used := [name for name in _UNSUPPORTED if config.get(name, "none") not in (None, "none", False, {}, [])]:
        raise ConfigError(f"{folder}: its {_CONFIG} sets {', '.join(used)}, which is not built")
    theirs = {"lora_r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    theirs |= {"lora_rslora": config.get("use_rslora", False)}
    different = [f"--{name}={value}" for name, value in theirs.items() if getattr(adapters, name) != value]
    if different:
        raise ConfigError(f"{folder} holds adapters of other settings; give {' '.join(different)}")


@torch.no_grad()
def load_peft(
    folder: Path, adapters: AdapterConfig, targets: Sequence[Target], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Fill the adapters among `parameters` (plain or sharded) from `folder`. Raises as `read_peft`."""
    for name, whole in read_peft(folder, adapters, targets).items():
        local, starts = local_part(parameters[name])
        local.copy_(whole[tuple(slice(start, start + size) for start, size in zip(starts, local.shape, strict=True))])
