"""How a tensor of ours lies in a Hugging Face directory: under its own name, or in pieces under others.

Our names are those of the module in memory. Two families differ on disk:

| family | in memory | on disk |
|---|---|---|
| mixtral | `mlp.experts.gate_up_proj` [experts, 2 ffn, hidden] | `block_sparse_moe.experts.E.w1.weight` |
| | (gate rows first, then up) | and `block_sparse_moe.experts.E.w3.weight` |
| | `mlp.experts.down_proj` [experts, hidden, ffn] | `block_sparse_moe.experts.E.w2.weight` |
| | `mlp.gate.weight` | `block_sparse_moe.gate.weight` |
| llama4 | `model...` | `language_model.model...` where the directory holds the model with vision |
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Of a model with vision: its text model, and what that has no use for.
_TEXT_PREFIX = "language_model."
_VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
# Buffers that old versions stored; no weights of ours.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_BASE_PREFIXES = ("model.", "transformer.")


@dataclass(frozen=True)
class Piece:
    """The box of a tensor that one stored tensor holds: it starts at `offsets` and has `sizes`.

    The stored tensor has the same shape, without the leading dimension of 1 where `squeezed`.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    squeezed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.sizes[1:] if self.squeezed else self.sizes


def whole(name: str, shape: Sequence[int]) -> list[Piece]:
    return [Piece(name, (0,) * len(shape), tuple(shape))]


def published_pieces(name: str, shape: Sequence[int]) -> list[Piece]:
    """How the family's published directories store the tensor (and transformers' save_pretrained writes it)."""
    if name.endswith(".mlp.gate.weight"):
        return whole(name.replace(".mlp.gate.", ".block_sparse_moe.gate."), shape)
    experts = name.rsplit(".", 1)[0].replace(".mlp.experts", ".block_sparse_moe.experts")
    if name.endswith(".mlp.experts.gate_up_proj"):
        num_experts, rows, width = shape
        half = (1, rows // 2, width)
        return [
            Piece(f"{experts}.{expert}.{part}.weight", (expert, first_row, 0), half, squeezed=True)
            for expert in range(num_experts)
            for part, first_row in (("w1", 0), ("w3", rows // 2))
        ]
    if name.endswith(".mlp.experts.down_proj"):
        num_experts, rows, width = shape
        box = (1, rows, width)
        return [
            Piece(f"{experts}.{expert}.w2.weight", (expert, 0, 0), box, squeezed=True) for expert in range(num_experts)
        ]
    return whole(name, shape)


def pieces_in(name: str, shape: Sequence[int], stored: Collection[str]) -> list[Piece]:
    """How a directory that holds `stored` names has the tensor: under its own name, else as published."""
    return whole(name, shape) if name in stored else published_pieces(name, shape)


def vision_names(stored: Collection[str]) -> list[str]:
    """Of a model with vision the tensors that are not its text model's; none in any other directory."""
    if not any(name.startswith(_TEXT_PREFIX) for name in stored):
        return []
    return [name for name in stored if name.startswith(_VISION_PREFIXES)]


def canonical_names(stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Names as the text model has them -> names in the directory; what is no weight of a text model is left out."""
    left_out = set(vision_names(stored))
    canonical = {}
    for name in stored:
        if name not in left_out and not name.endswith(_IGNORED_SUFFIXES):
            short = name.removeprefix(_TEXT_PREFIX)
            # A weight that is there under both names is told from itself, and refused as one too many.
            canonical[name if short != name and short in stored else short] = name
    # The original GPT-2 directory was saved from the model without its head: all names lack their first word.
    for prefix in _BASE_PREFIXES:
        if any(name.startswith(prefix) for name in wanted) and not any(name.startswith(prefix) for name in canonical):
            return {name if name in wanted else f"{prefix}{name}": source for name, source in canonical.items()}
    return canonical
