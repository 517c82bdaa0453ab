"""Frozen weights held in NF4: put in place of those a model has, and filled.

A weight `NAME` becomes two parameters without gradient, `NAME_codes` and `NAME_scales`, whose dimension 0 are the
weight's rows; of fused experts [experts, rows, columns] all (expert, row) pairs. FSDP2 thus shards every weight by
rows, evenly also where the experts are fewer than the ranks, and gathers 0.52 bytes per weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed.mesh import local_part
from ..models.base import Matrix
from .nf4 import Quantised, quantise_into
from .nf4_format import Format
from .nf4_ops import packed_parts, unpacked

_SUFFIXES = ("codes", "scales")


@dataclass(frozen=True)
class Held:
    """How a module holds one of its weights."""

    layout: Format
    inputs_first: bool  # [.., in, out] instead of [.., out, in]


def hold_in_nf4(hf_model: nn.Module, matrices: Sequence[Matrix], *, double_quant: bool) -> None:
    """Hold `matrices` of `hf_model` in NF4, in place: before sharding, and after adapters are added.

    All else stays as it is, and biases must be frozen. Weights on the meta device become parameters without values (see
    `Nf4Weight.fill`), others are quantised.
    """
    from .nf4_modules import IN_NF4

    for matrix in matrices:
        owner, _, name = matrix.spec.name.rpartition(".")
        module = hf_model.get_submodule(owner)
        if type(module) not in IN_NF4.values():
            module.__class__ = IN_NF4[type(module)]
            module.nf4_held = {}  # type: ignore[assignment]
        weight = getattr(module, name).detach()
        layout = Format(tuple(weight.shape), double_quant)
        module.nf4_held[name] = Held(layout, matrix.inputs_first)  # type: ignore[operator, index, assignment]
        parts = packed_parts(weight, double_quant=double_quant)
        delattr(module, name)
        for suffix, part in zip(_SUFFIXES, parts, strict=True):
            module.register_parameter(f"{name}_{suffix}", nn.Parameter(part, requires_grad=False))


@dataclass(frozen=True)
class Nf4Weight:
    """A weight of a model that a module holds in NF4, before or after sharding."""

    module: nn.Module
    name: str
    layout: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of what holds it."""
        return self.layout.shape

    def parts(self) -> tuple[nn.Parameter, ...]:
        """The parameters that hold it."""
        return tuple(getattr(self.module, f"{self.name}_{suffix}") for suffix in _SUFFIXES)

    def local(self) -> tuple[Quantised, int]:
        """This rank's rows of the weight, and the number of the first."""
        (codes, starts), (scales, _) = (local_part(part) for part in self.parts())
        return unpacked(codes, scales), starts[0]

    def boxes(self) -> Iterator[tuple[slice, ...]]:
        """This rank's rows as boxes of the weight, each to be given to `fill`: all columns, and one expert at most."""
        quantised, start = self.local()
        stop = start + quantised.codes.shape[0]
        num_rows, num_columns = self.shape[-2:]
        for expert in range(start // num_rows, -(-stop // num_rows)):
            first = expert * num_rows
            within = slice(max(start - first, 0), min(stop - first, num_rows)), slice(0, num_columns)
            yield (slice(expert, expert + 1), *within) if len(self.shape) == 3 else within

    def empty(self, box: tuple[slice, ...]) -> torch.Tensor:
        """Room for the values of a box: float32, whatever the run computes in, so that a weight always has one code."""
        device = self.parts()[0].device
        return torch.empty([span.stop - span.start for span in box], dtype=torch.float32, device=device)

    def fill(self, box: tuple[slice, ...], values: torch.Tensor) -> None:
        """Quantise `values`, the weight's in `box`, one of `boxes`, into this rank's part."""
        quantised, start = self.local()
        expert = box[0].start if len(self.shape) == 3 else 0
        first = expert * self.shape[-2] + box[-2].start - start
        num_rows = box[-2].stop - box[-2].start
        quantise_into(quantised.rows(first, first + num_rows), values, self.layout)


def nf4_weights(root: nn.Module) -> dict[str, Nf4Weight]:
    """The weights of `root` held in NF4, by the names they have in the model without."""
    found: dict[str, Nf4Weight] = {}
    for path, module in root.named_modules():
        held_weights: dict[str, Held] = getattr(module, "nf4_held", {})
        for name, held in held_weights.items():
            found[f"{path}.{name}" if path else name] = Nf4Weight(module, name, held.layout)
    return found
