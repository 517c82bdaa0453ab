"""The newest valid checkpoint over all tiers, by agreement of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError, DamagedCheckpoint, StorageError
from ..log import logger
from .lineage import Lineage
from .tier import CheckpointRecord, Tier


@dataclass(frozen=True)
class Search:
    """What was found: the checkpoint that was loaded (None: there is none), and what else was seen on the way.

    `refused` are locations found damaged; `silent` maps tiers that could not be asked to the reason. `is_own`: these
    were the run's own tiers, not another place.
    """

    record: CheckpointRecord | None = None
    tier: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    lineages: frozenset[Lineage] = frozenset()
    refused: frozenset[str] = frozenset()
    silent: Mapping[str, str] = field(default_factory=dict)
    is_own: bool = False


def restore_newest(tiers: Sequence[Tier], tensors: Mapping[str, torch.Tensor], *, is_own: bool = False) -> Search:
    """Fill `tensors` in place from the newest valid checkpoint. Collective; every rank returns the same.

    Newest is the highest step of the latest timeline; on a tie the tier that stands first in `tiers` is taken. A
    damaged or unreachable checkpoint is named in a warning and passed over by all ranks. Raises CheckpointError when
    the newest valid one is of another model, and when there are checkpoints but none is valid, or when nothing was
    found and a tier could not be asked: starting anew would hide the loss.
    """
    candidates: list[tuple[CheckpointRecord, int]] = []
    silent: dict[str, str] = {}
    for number, tier in enumerate(tiers):
        try:
            candidates += [(record, number) for record in tier.list()]
        except StorageError as error:
            silent[tier.name] = str(error)
            _warn(tier, f"{tier.name} cannot be asked for checkpoints and is left out: {error}")
    candidates.sort(key=lambda one: (one[0].lineage, one[0].step, -one[1], one[0].attempt), reverse=True)
    lineages = frozenset(lineage for tier in tiers for lineage in tier.lineages())
    refused: dict[str, str] = {}
    for record, number in candidates:
        tier = tiers[number]
        try:
            facts = tier.load(record, tensors)
        except (DamagedCheckpoint, StorageError) as error:
            refused[record.location] = str(error)
            _warn(tier, f"checkpoint {record.location} is damaged and passed over: {error}")
            continue
        return Search(record, tier.name, facts, lineages, frozenset(refused), silent, is_own)
    if refused:
        found = "; ".join(f"{location}: {text}" for location, text in refused.items())
        raise CheckpointError(f"no checkpoint is valid, found {len(refused)} damaged: {found}")
    if silent:
        raise StorageError(
            f"found no checkpoint, but {', '.join(silent)} could not be asked: {'; '.join(silent.values())}"
        )
    return Search(lineages=lineages)


def _warn(tier: Tier, text: str) -> None:
    if tier.peers.is_main:
        logger.warning(text)
