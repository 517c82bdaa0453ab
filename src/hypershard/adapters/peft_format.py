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

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.flags import coerce
from ..config.schema import AdapterConfig
from ..distributed.mesh import local_part
from ..errors import CheckpointError, ConfigError, DataError
from ..models.base import Matrix
from ..remote_files import open_file
from ..storage import local_path, readable_errors, write_json
from .targets import Target, target_of

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_AFTER_LAYER = re.compile(r"\.(?:layers|h)\.\d+\.(.+)$")
# Settings of PEFT's that say nothing of what the matrices mean, or that are read here. All others must be off: they
# change what the same matrices compute, as versions to come may.
# fmt: off
_UNDERSTOOD = frozenset((
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "use_rslora",
))
# fmt: on
# First values that leave the base as it is. Others (PiSSA, OLoRA, LoftQ) change it: A and B alone are not the update.
_PLAIN_STARTS = (None, True, False, "gaussian")
_CAN_BE: dict[str, Callable[[Any], bool]] = {
    "lora_r": lambda value: type(value) is int and value > 0,
    "lora_alpha": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "lora_rslora": lambda value: type(value) is bool,
    "bnb_quant_type": lambda value: type(value) is str,
    "bnb_double_quant": lambda value: type(value) is bool,
}
_NAMES_SHOWN = 3
# In the head of the weights' file, which others leave alone: what hypershard knows of the training.
_TRAINING = "hypershard"


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder in PEFT's format holds: its settings, and its matrices by PEFT's names, on the host.

    `training`: what hypershard's own export says of the training, {} in others'; `digest` tells it from any other.
    """

    location: str
    config: Mapping[str, Any]
    stored: Mapping[str, torch.Tensor]
    training: Mapping[str, Any]
    digest: str
    size_bytes: int

    @property
    def settings(self) -> AdapterConfig:
        """Rank, alpha and scaling, and how the base was held. Raises ConfigError where something else is set."""
        _check_kind(self.location, self.config)
        found = {
            "lora_r": self.config.get("r"),
            "lora_alpha": self.config.get("lora_alpha"),
            "lora_rslora": self.config.get("use_rslora") or False,
            **{name: self.training[name] for name in ("bnb_quant_type", "bnb_double_quant") if name in self.training},
        }
        for name, value in found.items():
            if not _CAN_BE[name](value):
                raise ConfigError(f"{self.location}: its {_CONFIG} or weights have {name} {value!r}, which cannot be")
        return AdapterConfig(**{name: coerce(name, value, where=self.location) for name, value in found.items()})

    def targets(self, matrices: Sequence[Matrix]) -> list[Target]:
        """Those of a model's `matrices` that have adapters here; what fits none is met when they are read."""
        rank = self.settings.lora_r
        parameters = self.config.get("target_parameters") or ()
        keys = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in self.stored}
        found = []
        for matrix in matrices:
            if matrix.num_experts is None:
                is_here = matrix.name in keys
            else:
                is_here = any(f".{matrix.name}".endswith(f".{name}") for name in parameters)
            if is_here:
                found.append(target_of(matrix, rank))
        return found


def open_peft(location: str, *, flag: str) -> PeftAdapter:
    """Read the adapter in the folder, or below the s3:// prefix, that `flag` names; whole, for adapters are small.

    Raises CheckpointError when there is none, StorageError when a bucket does not answer.
    """
    from safetensors.torch import load

    folder = location.rstrip("/") if location.startswith("s3://") else str(local_path(location, flag=flag))
    content = {}
    try:
        for name in (_CONFIG, _WEIGHTS):
            with open_file(f"{folder}/{name}") as file:
                content[name] = file.read()
        config, stored = json.loads(content[_CONFIG]), load(content[_WEIGHTS])
        head = json.loads(content[_WEIGHTS][8 : 8 + int.from_bytes(content[_WEIGHTS][:8], "little")])
        training = json.loads(head.get("__metadata__", {}).get(_TRAINING, "{}"))
        for value in (config, training, training.get("bit_sums", {})):
            if not isinstance(value, dict):
                raise ValueError(f"found {type(value).__name__}, expected an object")
    except (OSError, ValueError, TypeError, DataError, _safetensors_error()) as error:
        raise CheckpointError(
            f"{flag}={location} cannot be read as an adapter in PEFT's format: {type(error).__name__}: {error}; "
            f"expected a folder with {_CONFIG} and {_WEIGHTS}"
        ) from error
    digest = hashlib.sha256(content[_CONFIG] + content[_WEIGHTS]).hexdigest()
    return PeftAdapter(location, config, stored, training, digest, sum(map(len, content.values())))


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error


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
    training: Mapping[str, Any],
) -> None:
    """Write the adapters (by our names, whole) into `folder`, which exists. `base`: the model's folder or hub name.

    `training` is what else is known, as JSON holds it. Raises StorageError.
    """
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    for one in _stored(targets):
        a, b = _to_peft(one.target, tensors[one.target.a.name], tensors[one.target.b.name])
        # Copies, because safetensors refuses tensors that share memory or leave gaps.
        stored |= {one.key_a: a.clone(memory_format=torch.contiguous_format)}
        stored |= {one.key_b: b.clone(memory_format=torch.contiguous_format)}
    with readable_errors(folder / _WEIGHTS, "writing"):
        save_file(stored, folder / _WEIGHTS, metadata={"format": "pt", _TRAINING: json.dumps(training)})
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


def matrices_of(adapter: PeftAdapter, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
    """The adapter's matrices by our names, float32. Raises CheckpointError where they are not those of `targets`."""
    stored = dict(adapter.stored)
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
    wrong = wrong or [f"{key}: found in the folder, not among the weights that get adapters" for key in sorted(stored)]
    if wrong:
        more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
        raise CheckpointError(
            f"{adapter.location} holds other adapters: {'; '.join(wrong[:_NAMES_SHOWN])}{more}. The model, "
            f"--lora_targets and --lora_r must be as in its {_CONFIG}"
        )
    return found


def _check_kind(location: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{location}: its {_CONFIG} describes no LoRA adapter (peft_type LORA)")
    off: tuple[Any, ...] = (None, "none", False, {}, [])
    used = [name for name, value in config.items() if name not in _UNDERSTOOD and value not in off]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        used.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if used:
        raise ConfigError(f"{location}: its {_CONFIG} sets {', '.join(sorted(used))}, which is not built")


@torch.no_grad()
def load_peft(
    adapter: PeftAdapter, adapters: AdapterConfig, targets: Sequence[Target], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Fill the adapters among `parameters` (plain or sharded).

    Raises ConfigError where the adapter's settings are not those of `adapters`, and as `matrices_of`.
    """
    theirs = adapter.settings
    names = ("lora_r", "lora_alpha", "lora_rslora")
    different = [
        f"--{name}={getattr(theirs, name)}" for name in names if getattr(theirs, name) != getattr(adapters, name)
    ]
    if different:
        raise ConfigError(f"{adapter.location} holds adapters of other settings; give {' '.join(different)}")
    for name, whole in matrices_of(adapter, targets).items():
        local, starts = local_part(parameters[name])
        local.copy_(whole[tuple(slice(start, start + size) for start, size in zip(starts, local.shape, strict=True))])
