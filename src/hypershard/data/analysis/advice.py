"""What a plan makes of a data set, and what is known to go wrong with such data. Pure functions of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..packs import PACKINGS
from .analyze import DatasetAnalysis
from .repetition import DataWarning, Passes, repetition_warnings, small_set_warnings

# Copies of this share of the documents: between what a careful corpus holds (Wiki-40B, 0.39%) and a crawl (C4, 3.04%)
# in table 2 of Lee et al. 2021, "Deduplicating Training Data Makes Language Models Better".
DUPLICATE_SHARE = 0.01
LEE = "Lee et al. 2021, arXiv:2107.06499"
# What is cut short is learnt to be left unfinished (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
# They name no threshold; one document in a hundred is this project's choice.
CUT_SHARE = 0.01
DING = "Ding et al. 2024, arXiv:2404.10830"
# This project's choices: rows to look at before training, and a mixture that hardly is one.
NEAR_EMPTY_SHARE = 0.01
DOMINATING_SHARE = 0.9

# More documents are packed by a sample of them, evenly over their lengths: padding shares hardly differ.
_MOST_PACKED = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training to come. `samples_per_step`: sequences of `context_tokens` in an optimizer step over all GPUs.

    It ends after `num_steps` or `epochs`, whichever comes first; None: not limited so (both None: one epoch).
    """

    context_tokens: int
    samples_per_step: int
    num_steps: int | None
    epochs: int | None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What packing documents into sequences of `context_tokens` does to them, per pass over the data.

    `num_sequences` None: the number of documents is not known. `num_long`: documents longer than a sequence, of those
    read. `cut_documents_share` of the documents are cut (concat: expected, wherever a sequence ends; drop: left out);
    `lost_tokens_share` of the tokens are in no sequence.
    """

    packing: str
    long_documents: str
    context_tokens: int
    num_sequences: float | None
    num_long: int
    padding_share: float
    cut_documents_share: float
    lost_tokens_share: float


@dataclass(frozen=True, kw_only=True)
class Use(Passes):
    """What a plan makes of one data set, packed as in `fit`; None where its size is not known.

    `share` of all sequences come from it.
    """

    fit: Fit
    share: float
    num_steps: int | None
    num_tokens_seen: int | None


def fit_of(analysis: DatasetAnalysis, *, context_tokens: int, packing: str, long_documents: str) -> Fit:
    """How the documents fit by `packing` ('concat', 'best_fit', 'none') and `long_documents` ('split', 'truncate',
    'drop')."""
    lengths, counts = analysis.lengths_found, analysis.length_counts
    num_samples = analysis.num_samples
    num_long = int(counts[lengths > context_tokens + 1].sum())
    in_all = analysis.num_samples_in_all
    if packing == "concat":
        num_sequences = max(0, analysis.num_tokens - 1) // context_tokens
        # A sequence ends inside a document of n tokens with a chance of (n - 1) / T, or surely.
        cut = float(np.minimum(1.0, (lengths - 1) / context_tokens) @ counts) / num_samples
        padding = lost = 0.0
    else:
        every = max(1, num_samples // _MOST_PACKED)
        packed = _every(lengths, counts, every)
        ends = np.cumsum(packed)
        plan = PACKINGS[packing](
            ends - packed, num_tokens=int(ends[-1]), context_tokens=context_tokens, long_documents=long_documents
        )
        num_sequences = plan.num_packs * every
        cut, padding, lost = num_long / num_samples, plan.padding_share, plan.num_cut_tokens / int(ends[-1])
    return Fit(
        packing=packing,
        long_documents=long_documents,
        context_tokens=context_tokens,
        num_sequences=None if in_all is None else num_sequences * in_all / num_samples,
        num_long=num_long,
        padding_share=padding,
        cut_documents_share=cut,
        lost_tokens_share=lost,
    )


def _every(lengths: NDArray[np.int64], counts: NDArray[np.int64], every: int) -> NDArray[np.int64]:
    """Each `every`-th of the documents in the order of their lengths, without writing out all."""
    places = np.arange(every // 2, int(counts.sum()), every)
    return lengths[np.searchsorted(np.cumsum(counts), places, side="right")]


def uses_of(
    analyses: Sequence[DatasetAnalysis], fits: Sequence[Fit], weights: Sequence[Fraction | None], plan: Plan
) -> list[Use]:
    """What `plan` makes of each data set of a mixture. Without weights each has its share of all sequences."""
    sizes = [fit.num_sequences for fit in fits]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    given = [weight for weight in weights if weight is not None]
    if len(analyses) == 1:
        shares = [1.0]
    elif given:
        shares = [float(weight / sum(given)) for weight in given]
    else:
        shares = [1 / len(sizes) if total is None else (size or 0) / max(1, total) for size in sizes]
    epochs = plan.epochs or (1 if plan.num_steps is None else None)
    by_epochs = None if epochs is None or total is None else max(1, int(epochs * total // plan.samples_per_step))
    limits = [steps for steps in (plan.num_steps, by_epochs) if steps is not None]
    num_steps = min(limits) if limits else None
    return [_use(*one, plan, num_steps) for one in zip(analyses, fits, shares, strict=True)]


def _use(analysis: DatasetAnalysis, fit: Fit, share: float, plan: Plan, num_steps: int | None) -> Use:
    per_step = plan.samples_per_step * share
    steps_per_epoch = fit.num_sequences / per_step if fit.num_sequences and per_step else None
    unpacked = None if num_steps is None else analysis.epochs(num_steps, plan.samples_per_step)
    return Use(
        fit=fit,
        share=share,
        num_steps=num_steps,
        num_tokens_seen=None if num_steps is None else round(num_steps * per_step * plan.context_tokens),
        steps_per_epoch=steps_per_epoch,
        epochs=None if num_steps is None or steps_per_epoch is None else num_steps / steps_per_epoch,
        unpacked_epochs=None if unpacked is None else unpacked * share,
    )


def warnings(analysis: DatasetAnalysis, use: Use | None, *, is_fine_tuning: bool) -> list[DataWarning]:
    """What to look at before training on it as `use` says; None: no plan yet."""
    found = [*_row_warnings(analysis)]
    num_samples = analysis.num_samples_in_all
    if is_fine_tuning:
        found += small_set_warnings(num_samples)
    if use is not None:
        found += repetition_warnings(use, num_samples=num_samples, is_fine_tuning=is_fine_tuning)
        found += _fit_warnings(analysis, use.fit)
    return found


def _row_warnings(analysis: DatasetAnalysis) -> list[DataWarning]:
    found = []
    if analysis.num_malformed and analysis.malformed:
        text = f"{analysis.num_malformed:,} malformed rows stop a training; mend them, or set --malformed_rows=skip"
        found.append(DataWarning(code="malformed", text=text, source=""))
    if analysis.num_duplicates >= DUPLICATE_SHARE * analysis.num_samples:
        text = (
            f"{analysis.num_duplicates / analysis.num_samples:.1%} of the documents are copies of others: they are "
            f"learnt by heart, and those that validate make the validation loss too good; drop them"
        )
        found.append(DataWarning(code="duplicates", text=text, source=LEE))
    if analysis.num_near_empty >= NEAR_EMPTY_SHARE * analysis.num_samples:
        text = f"{analysis.num_near_empty:,} documents are empty or nearly so; look at them before training"
        found.append(DataWarning(code="near_empty", text=text, source=""))
    return found


def _fit_warnings(analysis: DatasetAnalysis, fit: Fit) -> list[DataWarning]:
    if fit.long_documents == "split" or fit.num_long < CUT_SHARE * analysis.num_samples:
        return []
    done = {"truncate": "cut short", "drop": "left out"}[fit.long_documents]
    text = (
        f"{fit.num_long / analysis.num_samples:.1%} of the documents are longer than {fit.context_tokens:,} tokens and "
        f"{done}, {fit.lost_tokens_share:.1%} of all tokens lost; raise --max_context_width to keep more whole"
    )
    return [DataWarning(code="long_documents", text=text, source=DING)]


def mixture_warnings(analyses: Sequence[DatasetAnalysis], uses: Sequence[Use]) -> list[DataWarning]:
    """Of a mixture as a whole."""
    if len(uses) < 2:
        return []
    return [
        DataWarning(
            code="dominating",
            text=f"{use.share:.0%} of all sequences are of {analysis.name}: the others hardly count",
            source="",
        )
        for analysis, use in zip(analyses, uses, strict=True)
        if use.share >= DOMINATING_SHARE
    ]
