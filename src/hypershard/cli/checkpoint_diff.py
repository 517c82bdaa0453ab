"""`hypershard checkpoint diff`: what two checkpoints do not have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.transfer import Progress
from ..errors import CheckpointError
from .checkpoint_places import one_checkpoint
from .progress import shown_bytes

if TYPE_CHECKING:
    from ..checkpoint.compare import Comparison, TensorDifference

_LINES_SHOWN = 40  # per kind; the summary counts all
_SHOWN_CHARACTERS = 60
_SIGNS = ("-", "+")


def diff_checkpoints(places: tuple[str, str], *, pattern: str | None, with_values: bool) -> int:
    """Print the differences; 0 when there are none, 1 when there are. Raises CheckpointError."""
    stored = [one_checkpoint(place) for place in places]
    manifests = [one.manifest() for one in stored]
    from ..checkpoint.compare import Side, compare

    for sign, one, manifest in zip(_SIGNS, stored, manifests, strict=True):
        start = manifest.lineage.generation
        print(f"{sign} {one.location}  step {one.step}, {manifest.world_size} ranks, start {start}")
    total_bytes = sum(manifest.size_bytes for manifest in manifests)
    with shown_bytes(total_bytes, "comparing") as show:
        progress = Progress(show)
        sides = [Side(one, manifest, progress) for one, manifest in zip(stored, manifests, strict=True)]
        found = compare(sides[0], sides[1], pattern=pattern, with_values=with_values)
    if pattern is not None and not (found.tensors or any(found.only)):
        raise CheckpointError(f"--tensors={pattern}: no tensor of either checkpoint has such a name")
    _print(found, with_values=with_values)
    return 0 if found.is_equal else 1


def _shown(value: str | None) -> str:
    """A fact's value, or its beginning: cursors of streams are long."""
    if value is None:
        return "(not there)"
    return value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}… ({len(value)} characters)"


def _print(found: Comparison, *, with_values: bool) -> None:
    for name, (one, other) in found.facts.items():
        print(f"fact {name}: {_shown(one)} -> {_shown(other)}")
    for sign, names in zip(_SIGNS, found.only, strict=True):
        _print_some([f"{sign} {name}" for name in names])
    layouts = [tensor for tensor in found.tensors if not tensor.same_layout]
    _print_some([f"{tensor.name}: {tensor.layouts[0]} -> {tensor.layouts[1]}" for tensor in layouts])
    differing = [tensor for tensor in found.tensors if tensor.values is not None and tensor.values.num_differing]
    differing.sort(key=lambda tensor: tensor.values.relative if tensor.values else 0.0, reverse=True)
    if differing:
        print(f"{'relative':>9}  {'max rel':>9}  {'max abs':>9}  {'differing elements':>34}  tensor")
    _print_some([_values(tensor) for tensor in differing])
    print(_summary(found, len(layouts), len(differing), with_values=with_values))


def _print_some(lines: list[str]) -> None:
    for line in lines[:_LINES_SHOWN]:
        print(line)
    if len(lines) > _LINES_SHOWN:
        print(f"... and {len(lines) - _LINES_SHOWN} more; --tensors PATTERN shows those of a name")


def _values(tensor: TensorDifference) -> str:
    values = tensor.values
    assert values is not None
    share = f"{values.num_differing:,} of {values.num_elements:,}"
    sizes = f"{values.relative:>9.3g}  {values.max_relative:>9.3g}  {values.max_absolute:>9.3g}"
    return f"{sizes}  {share:>34}  {tensor.name}"


def _summary(found: Comparison, num_layouts: int, num_differing: int, *, with_values: bool) -> str:
    num_only = sum(map(len, found.only))
    compared = f"{num_differing} in values" if with_values else "values not compared"
    if found.is_equal:
        text = "equal" if with_values else "equal in layout"
        return f"{text}: {len(found.tensors)} tensors, {found.num_equal_unread} of them by their checksums alone"
    return (
        f"different: {len(found.facts)} facts; of {len(found.tensors) + num_only} tensors {num_only} are on one side "
        f"only, {num_layouts} differ in shape or dtype, {compared}"
    )
