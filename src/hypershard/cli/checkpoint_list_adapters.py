"""`hypershard checkpoint list` of adapters: what a folder in PEFT's format or a run's checkpoint holds of them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.targets import Target, adapter_specs, adapter_targets
from ..checkpoint.manifest import StoredCheckpoint
from ..checkpoint.stores import open_store
from ..config.schema import AdapterConfig, ModelConfig
from ..errors import CheckpointError, UserError
from ..units import format_bytes, format_count, quoted
from .checkpoint_adapters import base_folder
from .checkpoint_merge import FolderAdapters, FolderWeights, GivenAdapter

_IN_LAYER = re.compile(r".*\.(?:layers|h)\.\d+\.(?:.*\.)?(?:self_attn|attn|mlp|feed_forward)\.(?P<end>.+)")
_ELSEWHERE = "not on this machine, so not compared"
_BASE_SHOWN = 200


@dataclass(frozen=True)
class AdapterRow:
    """Adapters at one place. `step` of the training, None where nobody says; `base` as the training named it.

    `fit` says whether the base is there and its tensors have the shapes that the adapters are for. Values are not read:
    a merge compares them.
    """

    location: str
    step: int | None
    rank: int
    alpha: float
    rank_stabilised: bool
    targets: list[str]
    num_parameters: int | None
    size_bytes: int
    base: str | None
    fit: str

    def shown(self) -> str:
        """Two lines."""
        scaling = f"alpha {self.alpha:g}" + (", rank-stabilised" if self.rank_stabilised else "")
        parameters = "" if self.num_parameters is None else f"{format_count(self.num_parameters)} parameters, "
        step = "" if self.step is None else f"step {self.step}, "
        base = "a model not named" if self.base is None else quoted(self.base, most=_BASE_SHOWN)
        return (
            f"adapters {step}rank {self.rank}, {scaling}, {parameters}{format_bytes(self.size_bytes)}: "
            f"{', '.join(self.targets)}\n         beside {base}: {self.fit}"
        )


def is_adapter_folder(place: str) -> bool:
    """Whether a path or s3:// URI holds adapters in PEFT's format. Raises StorageError when a bucket is silent."""
    return "adapter_config.json" in open_store(place.rstrip("/")).files("")


def folder_row(place: str) -> AdapterRow:
    """A folder in PEFT's format. Raises CheckpointError and ConfigError where it holds nothing that can be used."""
    from ..adapters.peft_format import open_peft

    adapter = open_peft(place, flag="PLACE")
    settings, base = adapter.settings, adapter.config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    step = adapter.training.get("step")
    return AdapterRow(
        location=place,
        step=step if isinstance(step, int) else None,
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        rank_stabilised=settings.lora_rslora,
        targets=sorted({_end(key) for key in adapter.stored}),
        num_parameters=sum(tensor.numel() for tensor in adapter.stored.values()),
        size_bytes=adapter.size_bytes,
        base=base,
        fit=_fit_of_folder(place, base),
    )


def checkpoint_row(stored: StoredCheckpoint, *, size_bytes: int) -> AdapterRow | None:
    """What a checkpoint holds; None of a whole model. `size_bytes`: with the optimizer's moments."""
    facts = stored.facts(stored.manifest())
    if facts.get("adapters") is None:
        return None
    model, config = ModelConfig(**facts["model"]), AdapterConfig(**facts["adapters"])
    targets, base = adapter_targets(model, config), str(facts["base"]["init_from"])
    return AdapterRow(
        location=stored.location,
        step=stored.step,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        rank_stabilised=config.lora_rslora,
        targets=_ends(targets),
        num_parameters=sum(spec.numel for spec in adapter_specs(targets)),
        size_bytes=size_bytes,
        base=base,
        fit="random weights, drawn from the seed" if base == "scratch" else _fit(base, model),
    )


def _is_here(base: str) -> bool:
    """Whether it is a folder of this machine. An adapter may name any hub or bucket; none is asked on its word."""
    return "://" not in base and Path(base).expanduser().is_dir()


def _fit_of_folder(place: str, base: str | None) -> str:
    from ..checkpoint.hf_folder import local_copy
    from ..models.from_hf import model_of_folder

    if base is None:
        return "nothing to compare with"
    if not _is_here(base):
        return _ELSEWHERE
    try:
        with tempfile.TemporaryDirectory(prefix="hypershard-") as folder:
            model = model_of_folder(local_copy(base_folder(base), Path(folder)), location=base)
        FolderAdapters(GivenAdapter(place, 1.0), model)
    except UserError as error:
        return f"does not match: {error}"
    return _fit(base, model)


def _fit(base: str, model: ModelConfig) -> str:
    if not _is_here(base):
        return _ELSEWHERE
    try:
        FolderWeights(base_folder(base), model)
    except CheckpointError as error:
        return f"does not match: {error}"
    except UserError as error:
        return f"cannot be asked: {error}"
    return "matches in names and shapes"


def _ends(targets: Sequence[Target]) -> list[str]:
    return sorted({_end(target.matrix.name) for target in targets})


def _end(name: str) -> str:
    """The part of a matrix's or a stored tensor's name that all layers share: q_proj, experts.down_proj."""
    name = re.sub(r"(?:\.base_layer)*\.lora_[AB]\.weight$", "", name)
    match = _IN_LAYER.fullmatch(name)
    return match["end"] if match else name
