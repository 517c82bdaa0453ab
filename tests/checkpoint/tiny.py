"""What the checkpoint tests save: a few odd-shaped tensors whose values follow from a number."""

from __future__ import annotations

import torch

SHAPES = {
    "model/embedding": (7, 3),
    "model/one_row": (1, 4),
    "model/norm": (5,),
    "optimizer/exp_avg/embedding": (7, 3),
}


def values(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["model/half"] = torch.randn((3, 2), generator=generator).bfloat16()
    tensors["optimizer/count"] = torch.tensor(number, dtype=torch.int64)
    return tensors


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in values(0).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)
