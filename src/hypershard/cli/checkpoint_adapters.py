"""What `export` and `generate` make of a checkpoint with adapters: whole weights, or a folder in PEFT's format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.targets import Target, adapter_targets, nf4_formats, scale_of
from ..checkpoint.manifest import StoredCheckpoint
from ..config.schema import AdapterConfig, ModelConfig
from ..errors import CheckpointError
from ..log import logger
from ..models.family import ParameterSpec, family_of
from ..storage import make_directory, remove_tree, sync_directory

if TYPE_CHECKING:
    import torch

    from ..checkpoint.hf import HfWeights
    from ..checkpoint.hf_export import CheckpointWeights, Weights


def whole_weights(stored: StoredCheckpoint, *, base: str | None) -> Weights:
    """The model's weights at a checkpoint; of adapters with the weights they were trained beside, merged.

    Those are read from `base`, a folder or s3://bucket/prefix; None: from where the run had them. What the run held in
    NF4 is merged into the model's own weights, not into these rounded to four bits. Raises CheckpointError when they
    are not there or were changed.
    """
    from ..checkpoint.hf_export import CheckpointWeights

    facts = stored.facts(stored.manifest())
    weights = CheckpointWeights(stored)
    if facts.get("adapters") is None:
        if base is not None:
            raise CheckpointError(f"--base={base} acts only on adapters, and {stored.location} holds a whole model")
        return weights
    merged = MergedWeights(weights, facts, base=_base(facts, base))
    if merged.formats:
        logger.warning(
            "the adapters were trained beside weights in nf4 and are merged into the model's own, which are not "
            "quantised: what comes out is close to what was trained, not equal to it"
        )
    return merged


def _base(facts: Mapping[str, Any], given: str | None) -> str:
    base = given or str(facts["base"]["init_from"])
    if base == "scratch":
        raise CheckpointError(
            "these adapters were trained beside random weights, drawn from the seed: there is no model to merge them "
            "into; --adapter writes them by themselves"
        )
    return base


class MergedWeights:
    """A model folder's weights with a checkpoint's adapters worked in."""

    def __init__(self, adapters: CheckpointWeights, facts: Mapping[str, Any], *, base: str):
        from ..checkpoint.hf import HfWeights
        from ..checkpoint.hf_folder import read_model_folder

        model = ModelConfig(**facts["model"])
        config = AdapterConfig(**facts["adapters"])
        folder = read_model_folder(base)
        names = [spec.name for spec in family_of(model.model_type).parameters(model)]
        self.shapes = {spec.name: spec.shape for spec in family_of(model.model_type).parameters(model)}
        self._base: HfWeights = HfWeights(folder, self.shapes)
        self.formats = nf4_formats(model, config)
        self._location = base
        self._bit_sums = dict(zip(names, facts["base"]["bit_sums"], strict=True))
        self._adapters = adapters
        self._targets = {target.matrix.spec.name: target for target in adapter_targets(model, config)}
        self._scale = scale_of(config)
        files = sorted((name, file.size_bytes, str(file.version)) for name, file in folder.files.items())
        self.identity = hashlib.sha256(repr((adapters.identity, files)).encode()).hexdigest()

    def read(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Whole tensors on the host, each summed in float32 and rounded once.

        Raises CheckpointError where the model's values are not those the adapters were trained beside.
        """
        import torch

        from ..checkpoint.hf import Part

        specs = [spec for name in names if name in self._targets for spec in _specs(self._targets[name])]
        adapters = self._adapters.read([spec.name for spec in specs], torch.float32)
        being_read: dict[str, torch.Tensor] = {}

        def parts() -> Iterator[Part]:
            for name in names:
                being_read[name] = torch.empty(self.shapes[name])
                yield Part(name, self.shapes[name], being_read[name], (0,) * len(self.shapes[name]))

        return {name: self._merged(name, being_read.pop(name), adapters).to(dtype) for name in self._base.fill(parts())}

    def _merged(self, name: str, weight: torch.Tensor, adapters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from ..adapters.lora import bit_sum
        from ..adapters.merge import merge_box
        from ..adapters.nf4_ops import packed_parts

        held: tuple[torch.Tensor, ...] = (weight,)
        if name in self.formats:
            held = packed_parts(weight, double_quant=self.formats[name].double_quant)
        if sum(int(bit_sum(part)) for part in held) != self._bit_sums[name]:
            raise CheckpointError(
                f"{self._location} is not the model these adapters were trained beside: {name} has other values; give "
                f"that model by --base"
            )
        if name not in self._targets:
            return weight
        target = self._targets[name]
        a, b = (adapters[spec.name] for spec in _specs(target))
        return merge_box(weight, target, a, b, scale=self._scale, offsets=(0,) * weight.ndim)


def _specs(target: Target) -> tuple[ParameterSpec, ParameterSpec]:
    return target.a, target.b


def write_adapter(stored: StoredCheckpoint, output: Path, *, base: str | None) -> None:
    """Write a checkpoint's adapters as `peft` reads them. Raises CheckpointError and StorageError."""
    import torch

    from ..adapters.peft_format import save_peft
    from ..checkpoint.hf_export import CheckpointWeights

    facts = stored.facts(stored.manifest())
    if facts.get("adapters") is None:
        raise CheckpointError(f"--adapter: {stored.location} holds a whole model and no adapters; drop the flag")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output={output} exists already; expected a new or empty directory")
    config, model = AdapterConfig(**facts["adapters"]), ModelConfig(**facts["model"])
    targets = adapter_targets(model, config)
    weights = CheckpointWeights(stored)
    tensors = weights.read(list(weights.shapes), torch.float32)
    trained_beside = base or facts["base"]["init_from"]
    temporary = output.with_name(f".{output.name}.partial")
    remove_tree(temporary)
    make_directory(temporary)
    try:
        save_peft(
            temporary, tensors, targets, adapters=config, base=None if trained_beside == "scratch" else trained_beside
        )
        sync_directory(temporary)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
        sync_directory(output.parent)
    finally:
        remove_tree(temporary)
