"""What a search found, as a page: winners, their flags, the front of hours and dollars, and what was refused."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from ..plan.bytes import BAND, GIB
from ..plan.estimate import LEVEL, Change
from ..plan.search.fit import SEARCHED, TIGHT_HANDICAP
from ..plan.search.result import THAT_FITS, Candidate, Refusal, SearchResult
from ..plan.search.search import Space
from ..units import format_bytes, format_count

_WIDTH = 120
_INDENT = " " * 9


def page(
    result: SearchResult, space: Space, *, flags: Mapping[str, Sequence[str]], model_name: str, service: str
) -> Iterator[str]:
    """Lines for people; `flags` are those of each winner, by its role."""
    yield from _question(result, space, model_name=model_name, service=service)
    yield ""
    if result.fastest is None:
        yield "nothing runs this training"
    else:
        yield _heads(result)
        for role, one in result.winners.items():
            yield _row(_said(role), one)
        yield from _missed(result)
        for text in dict.fromkeys(text for one in result.winners.values() for text in one.step.assumptions):
            yield from _wrapped(f"assumed: {text}", "")
        yield ""
        for role, words in flags.items():
            same = [other for other in flags if flags[other] == words]
            if same[0] == role:
                yield f"{', '.join(role.replace('_', ' ') for role in same)}:"
                yield f"  hypershard launch {'sagemaker' if service == 'sagemaker' else 'slurm'} {shlex.join(words)}"
        yield ""
        yield "front: of those with a known price, each is cheaper than all that are faster"
        for one in result.front:
            yield _row("", one)
    yield ""
    yield from _refused(result.refusals)


def _question(result: SearchResult, space: Space, *, model_name: str, service: str) -> Iterator[str]:
    known = result.num_steps is not None and result.num_tokens is not None
    length = f"; {result.num_steps:,} steps, {format_count(result.num_tokens or 0)} tokens" if known else ""
    yield f"search   {model_name}: {result.step_tokens:,} tokens in every step{length}"
    places = {(one.job.instance.name, one.job.num_nodes) for one in result.candidates}
    counts = ", ".join(map(str, space.node_counts))
    yield (
        f"{_INDENT}{len(space.instances)} instance type{'' if len(space.instances) == 1 else 's'} x {counts} nodes: "
        f"{len(places)} of {result.num_places} places run it; {service} prices"
    )
    searched = [name for name in SEARCHED if name not in space.held]
    yield from _wrapped(f"searched: train_batch_size{''.join(f', {name}' for name in searched)}", _INDENT)
    if space.held:
        yield f"{_INDENT}as given: {', '.join(sorted(space.held))}"
    if not known:
        yield f"{_INDENT}how long it trains is unknown: hours and dollars are of 10^9 tokens; give --max_steps, or"
        yield f"{_INDENT}--epochs with --dataset_tokens"
    yield (
        f"{_INDENT}[{LEVEL}; memory +-{BAND:.0%}, time and dollars as in the row; what is tight counts as "
        f"{TIGHT_HANDICAP - 1:.0%} slower and dearer]"
    )


def _said(role: str) -> str:
    """A role for people; the best that fits stands below the tight winner it is second to."""
    return "  that fits" if role.endswith(THAT_FITS) else role.replace("_", " ")


def _heads(result: SearchResult) -> str:
    per = "" if result.num_steps is not None else "/10^9"
    return (
        f"{'':<17}{'hours' + per:>11} {'+-':>4} {'dollars' + per:>13}  {'nodes x instance':<21} {'sharding':<8} "
        f"{'recompute':<9} {'offload':<11} {'batch':>7}  GPU memory"
    )


def place(one: Candidate) -> str:
    """`4 x p5.48xlarge`."""
    return f"{one.job.num_nodes} x {one.job.instance.name}"


def _row(label: str, one: Candidate) -> str:
    parallel, gpu = one.job.parallel, one.memory.gpu
    hours = one.hours_per_billion if one.hours is None else one.hours
    dollars = one.dollars_per_billion if one.dollars is None else one.dollars
    moved = ["activations"] * parallel.offload_activations + ["weights"] * parallel.cpu_offload
    level = "" if one.step.level == LEVEL else f", {one.step.level}"
    return (
        f"{label:<17}{hours:>11,.4g} {one.step.band:>4.0%} "
        f"{'unknown' if dollars is None else f'{dollars:,.2f}':>13}  {place(one):<21} {parallel.sharding_strategy:<8} "
        f"{parallel.activation_checkpointing:<9} {'both' if len(moved) == 2 else ''.join(moved) or '-':<11} "
        f"{f'{one.job.data.train_batch_size} x {one.job.accumulation}':>7}  "
        f"{gpu.needed_bytes / GIB:.1f} of {gpu.usable_bytes / GIB:.1f} GiB, {one.verdict}{level}"
    )


def _missed(result: SearchResult) -> Iterator[str]:
    if result.deadline_hours is None or result.cheapest_in_time is not None:
        return
    text = f"nothing of known price is done in {result.deadline_hours:g} h"
    if result.nearest_miss is not None:
        miss = result.nearest_miss
        text += f"; nearest: {place(miss)} with {miss.hours:,.4g} h and {miss.dollars:,.2f} dollars"
    if result.fastest is not None and (result.fastest.hours or 0.0) <= result.deadline_hours:
        text += f"; the price of {place(result.fastest)}, which is, is unknown"
    yield from _wrapped(text, "")


# --- what does not run


def _refused(refusals: Sequence[Refusal]) -> Iterator[str]:
    """What is short of memory, then other reasons; each with all the instances it holds for."""
    for title, are_short in (("refused, with what came closest:", True), ("left out:", False)):
        names: dict[str, list[str]] = {}
        for one in refusals:
            if (one.closest is not None) == are_short:
                text = _memory(one) if are_short else one.reason
                names.setdefault(f"{_nodes(one.node_counts)}: {text}", []).append(one.instance.name)
        if names:
            yield title
        for text, found in names.items():
            yield from _wrapped(f"{', '.join(found)} on {text}", "  ", more=2)


def _memory(one: Refusal) -> str:
    """What came closest, for one line: of a node's memory without the settings, which hardly change it."""
    assert one.closest is not None
    fit, job = one.closest.fit, one.closest.job
    text = (
        f"{format_bytes(fit.least_bytes)} of {format_bytes(fit.usable_bytes)}, {fit.of.partition(',')[0]}, on "
        f"{_nodes((job.num_nodes,))}"
    )
    if fit is one.closest.memory.gpu:
        flags = [Change("parallel", name, getattr(job.parallel, name)) for name in SEARCHED]
        text += f" with {' '.join(str(flag) for flag in flags)}"
    ways = [f"with {' '.join(one.remedy)}"] * bool(one.remedy)
    ways += [f"from {one.fits_from} nodes"] * (one.fits_from is not None)
    return f"{text}, mostly {one.closest.largest_term}" + (f"; fits {' or '.join(ways)}" if ways else "")


def _nodes(counts: Sequence[int]) -> str:
    if len(counts) > 3:
        return f"{counts[0]} to {counts[-1]} nodes"
    return f"{', '.join(map(str, counts))} node{'' if list(counts) == [1] else 's'}"


def _wrapped(text: str, indent: str, *, more: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + " " * more,
        break_on_hyphens=False,
        break_long_words=False,
    )
