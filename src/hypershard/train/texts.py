"""Texts that the model writes when it is validated: greedily, on all ranks together, because weights are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.encode.tokenizer import load_tokenizer
from ..data.packing import Batch
from ..distributed.collectives import gather_objects, sum_over_ranks
from .prompts import Ids, Prompts
from .setup import Job

_TOKENS_BETWEEN_LOOKS = 8  # at whether any rank still writes; a look waits for the device


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """What the model wrote after `prompt`: `num_tokens`, the end token included; `ended`: it ended by itself."""

    prompt: str
    text: str
    num_tokens: int
    ended: bool


def write_texts(job: Job) -> list[WrittenText]:
    """On rank 0 what the weights as they are write after each of `job.prompts`, in their order; nothing elsewhere.

    Collective.
    """
    prompts = job.prompts
    if prompts is None:
        return []
    everyone = gather_objects(go_on(job, prompts))
    if not job.world.ranks.is_main:
        return []
    written = {number: ids for of_rank in everyone for number, ids in of_rank.items()}
    assert job.tokenizer_path is not None  # choose_prompts refuses
    backend = load_tokenizer(job.tokenizer_path).backend
    return [_decoded(backend, prompt, written[number], prompts.ends) for number, prompt in enumerate(prompts.ids)]


def go_on(job: Job, prompts: Prompts) -> dict[int, Ids]:
    """The likeliest tokens after each prompt that is this rank's, by its number. Collective.

    Prompt i is rank i mod world_size's; a rank with fewer runs along, because all gather each other's weights. Each
    token is a forward of [rows, tokens], with no more rows than a validation batch has, so this needs no more memory
    than validation. Blocks run uncompiled: compiled ones would be made anew for this shape, and validation might then
    take those. Draws no random numbers, and leaves weights and gradients alone.
    """
    num_ranks = job.world.size
    num_rows = min(job.batch_sizes[1], -(-len(prompts.ids) // num_ranks))
    found: dict[int, Ids] = {}
    job.module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for start in range(0, len(prompts.ids), num_rows * num_ranks):
                turn = range(start, min(start + num_rows * num_ranks, len(prompts.ids)))
                found |= _continued(job, prompts, turn, num_rows)
    finally:
        job.module.train()
        job.sharded.reshard()
    return found


def _continued(job: Job, prompts: Prompts, turn: range, num_rows: int) -> dict[int, Ids]:
    """What follows those prompts of `turn` that are this rank's, by their numbers. Every rank does as many forwards."""
    device, context_tokens = job.world.device, job.model.max_context_width
    width = min(max(map(len, prompts.ids)) + prompts.max_new_tokens, context_tokens)
    own = [number for number in turn if number % job.world.size == job.world.ranks.rank]
    # A row that is nobody's is a token long and may become no longer. What stands right of a row's end is not looked
    # at: attention is causal.
    beginnings = [prompts.ids[number] for number in own] + [(0,)] * (num_rows - len(own))
    limits = [min(len(prompts.ids[number]) + prompts.max_new_tokens, context_tokens) for number in own]
    limits += [1] * (num_rows - len(own))
    ids = torch.zeros(num_rows, width, dtype=torch.int64)
    for row, beginning in enumerate(beginnings):
        ids[row, : len(beginning)] = torch.tensor(beginning)
    positions = torch.arange(width).expand(num_rows, width).contiguous()
    segments = job.attention.segments(Batch(input_ids=ids, labels=ids, position_ids=positions), device)
    ids, positions = ids.to(device), positions.to(device)
    lengths = torch.tensor([len(beginning) for beginning in beginnings], device=device)
    most = torch.tensor(limits, device=device)
    ends = torch.tensor(prompts.ends, dtype=torch.int64, device=device)
    rows, ended = torch.arange(num_rows, device=device), torch.zeros(num_rows, dtype=torch.bool, device=device)
    for number in range(prompts.max_new_tokens):
        is_open = ~ended & (lengths < most)
        if number and number % _TOKENS_BETWEEN_LOOKS == 0 and not sum_over_ranks([is_open.sum()], device=device).item():
            break
        chosen = job.module.next_tokens(ids, positions, segments, lengths - 1, prompts.num_ids)
        places = lengths.clamp(max=width - 1)
        ids[rows, places] = torch.where(is_open, chosen, ids[rows, places])
        lengths += is_open
        ended |= is_open & torch.isin(chosen, ends)
    found = zip(own, ids.tolist(), lengths.tolist(), strict=False)
    return {number: tuple(row[len(prompts.ids[number]) : length]) for number, row, length in found}


def _decoded(backend: Any, prompt: Ids, written: Ids, ends: Sequence[int]) -> WrittenText:
    """As text, without special tokens; the prompt with them, so that turns are seen."""
    # Decoded together, as some tokenizers drop the space that a text begins with.
    before, whole = (backend.decode(list(ids), skip_special_tokens=True) for ids in (prompt, (*prompt, *written)))
    is_whole = whole.startswith(before)  # not where the prompt ends inside a character
    return WrittenText(
        prompt=backend.decode(list(prompt), skip_special_tokens=False),
        text=whole[len(before) :] if is_whole else backend.decode(list(written), skip_special_tokens=True),
        num_tokens=len(written),
        ended=bool(written) and written[-1] in ends,
    )
