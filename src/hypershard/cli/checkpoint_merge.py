"""Adapters worked into the weights they stand beside: any number of them, of checkpoints and of folders as PEFT's."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..adapters.nf4_format import Format
from ..adapters.targets import Target, adapter_targets, nf4_formats, scale_of
from ..config.schema import AdapterConfig, ModelConfig
from ..errors import CheckpointError
from ..log import logger
from ..models.family import family_of

if TYPE_CHECKING:
    import torch

    from ..checkpoint.hf_export import CheckpointWeights, Weights
    from ..checkpoint.hf_folder import ModelFolder


@dataclass(frozen=True)
class GivenAdapter:
    """What --adapter names: a folder in PEFT's format or an s3:// prefix of one, and how many times it counts."""

    location: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> GivenAdapter:
        """FOLDER or FOLDER:WEIGHT, for argparse. What follows the last colon is a weight where it is a number."""
        location, _, last = text.rpartition(":")
        try:
            weight = float(last)
        except ValueError:
            return cls(text, 1.0)
        if not location or not math.isfinite(weight) or weight == 0:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected FOLDER:WEIGHT with a number other than 0")
        return cls(location, weight)


@dataclass(frozen=True)
class Beside:
    """What tells the weights that adapters were trained beside: a number for each (adapters/lora.py), by its name.

    Of weights with a format here it is the number of what they are in NF4.
    """

    bit_sums: Mapping[str, int]
    formats: Mapping[str, Format]

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> Beside:
        """What a checkpoint of adapters says."""
        model, config = ModelConfig(**facts["model"]), AdapterConfig(**facts["adapters"])
        names = [spec.name for spec in family_of(model.model_type).parameters(model)]
        return cls(dict(zip(names, facts["base"]["bit_sums"], strict=True)), nf4_formats(model, config))

    def check(self, name: str, held: Sequence[torch.Tensor], *, base: str, adapters: str) -> None:
        """Raise CheckpointError where `held`, a weight of `base` or what holds it in NF4, is not what it was."""
        from ..adapters.lora import bit_sum

        if sum(int(bit_sum(one)) for one in held) != self.bit_sums.get(name):
            raise CheckpointError(
                f"{base} is not the model that the adapters of {adapters} were trained beside: {name} has other "
                f"values; give that model"
            )


class Adapters(Protocol):
    """Adapters of one origin. `targets` are by the name of the weight, `scale` is all that B A is multiplied by."""

    location: str
    targets: Mapping[str, Target]
    scale: float
    beside: Beside | None
    identity: str

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Matrices by our names, float32, on the host."""


class CheckpointAdapters:
    """Those that a checkpoint holds."""

    def __init__(self, weights: CheckpointWeights, facts: Mapping[str, Any], *, location: str):
        model, config = ModelConfig(**facts["model"]), AdapterConfig(**facts["adapters"])
        self.location = location
        self.targets: Mapping[str, Target] = {
            target.matrix.spec.name: target for target in adapter_targets(model, config)
        }
        self.scale = scale_of(config)
        self.beside: Beside | None = Beside.of_checkpoint(facts)
        self.identity = weights.identity
        self._weights = weights

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        import torch

        return self._weights.read(names, torch.float32)


class FolderAdapters:
    """Those in a folder as PEFT writes it, all in memory: they are small. Another process reads them itself.

    Raises ConfigError and CheckpointError where they are not adapters of `model`.
    """

    def __init__(self, given: GivenAdapter, model: ModelConfig):
        from ..adapters.peft_format import matrices_of, open_peft

        adapter = open_peft(given.location, flag="--adapter")
        targets = adapter.targets(family_of(model.model_type).matrices(model))
        self.location = given.location
        self.targets: Mapping[str, Target] = {target.matrix.spec.name: target for target in targets}
        self.scale = given.weight * scale_of(adapter.settings)
        sums = adapter.training.get("bit_sums")
        self.beside = None if sums is None else Beside(sums, nf4_formats(model, adapter.settings))
        self.identity = f"{given.weight} {adapter.digest}"
        self._origin = (given, model)
        self._matrices = matrices_of(adapter, targets)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (*self._origin, self.identity)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._matrices[name] for name in names}


def _reopened(given: GivenAdapter, model: ModelConfig, identity: str) -> FolderAdapters:
    adapters = FolderAdapters(given, model)
    if adapters.identity != identity:
        raise CheckpointError(f"--adapter={given.location} changed while it was being merged; do it again")
    return adapters


class FolderWeights:
    """The weights of a model folder, as they lie there. Raises CheckpointError where they are not those of `model`."""

    def __init__(self, folder: ModelFolder, model: ModelConfig):
        from ..checkpoint.hf import HfWeights

        self.shapes = {spec.name: spec.shape for spec in family_of(model.model_type).parameters(model)}
        files = sorted((name, file.size_bytes, str(file.version)) for name, file in folder.files.items())
        self.identity = hashlib.sha256(repr(files).encode()).hexdigest()
        self.location = folder.location
        self._weights = HfWeights(folder, self.shapes)

    def one_by_one(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors in float32, on the host."""
        import torch

        from ..checkpoint.hf import Part

        being_read: dict[str, torch.Tensor] = {}

        def parts() -> Iterator[Part]:
            for name in names:
                being_read[name] = torch.empty(self.shapes[name])
                yield Part(name, self.shapes[name], being_read[name], (0,) * len(self.shapes[name]))

        for name in self._weights.fill(parts()):
            yield name, being_read.pop(name)

    def read(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Whole tensors in `dtype`, on the host."""
        return {name: weight.to(dtype) for name, weight in self.one_by_one(names)}


class MergedWeights:
    """Weights with the adapters of `parts` worked in: W + the sum of each one's scale x B A."""

    def __init__(self, base: Weights, parts: Sequence[Adapters], *, location: str):
        self.shapes = base.shapes
        self.identity = hashlib.sha256(repr((base.identity, *(part.identity for part in parts))).encode()).hexdigest()
        self._base, self._parts, self._location = base, tuple(parts), location
        for part in parts:
            if part.beside is None:
                logger.warning(f"{part.location} does not say beside which weights it was trained; these are taken")
            elif part.beside.formats:
                logger.warning(
                    f"the adapters of {part.location} were trained beside weights in nf4 and are merged into the "
                    f"model's own, which are not quantised: what comes out is close to what was trained, not equal"
                )

    def read(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Whole tensors on the host, each summed in float32 and rounded once.

        Raises CheckpointError where the values are not those the adapters were trained beside.
        """
        matrices = [part.read([name for one in names for name in _pair(part.targets.get(one))]) for part in self._parts]
        merged = {}
        for name, weight in self._one_by_one(names):
            whole = weight
            for part, pairs in zip(self._parts, matrices, strict=True):
                self._check(name, weight, part)
                whole = _added(name, whole, part, pairs)
            merged[name] = whole.to(dtype)
        return merged

    def _one_by_one(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        if isinstance(self._base, FolderWeights):
            yield from self._base.one_by_one(names)
            return
        weights = self._base.read(names, torch.float32)
        for name in names:
            yield name, weights.pop(name)

    def _check(self, name: str, weight: torch.Tensor, part: Adapters) -> None:
        from ..adapters.nf4_ops import packed_parts

        if part.beside is None:
            return
        held: tuple[torch.Tensor, ...] = (weight,)
        if name in part.beside.formats:
            held = packed_parts(weight, double_quant=part.beside.formats[name].double_quant)
        part.beside.check(name, held, base=self._location, adapters=part.location)


def _pair(target: Target | None) -> tuple[str, ...]:
    return () if target is None else (target.a.name, target.b.name)


def _added(name: str, weight: torch.Tensor, part: Adapters, matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from ..adapters.merge import merge_box

    target = part.targets.get(name)
    if target is None:
        return weight
    a, b = (matrices[one] for one in _pair(target))
    return merge_box(weight, target, a, b, scale=part.scale, offsets=(0,) * weight.ndim)
