"""What is in a data set: how many documents, how long, how many of them twice, empty or malformed.

Memory does not grow with the data: lengths are counted, and of hashes a bounded sample is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...config.schema import DataConfig
from ...errors import DataError
from ..bins.meta import read_meta
from ..bins.nanogpt import is_nanogpt
from ..bins.prepare import BYTES_PER_PROCESS, Progress
from ..bins.token_bins import TokenBins, dtype_for, numpy_dtype
from ..kinds import CHAT, PREFERENCE
from ..mixture import parse_dataset
from ..open import Text, bins_folder, open_bins, resolve_text
from ..records import Malformed
from .measured import Measured, bins_documents, text_documents
from .tally import Tally

# Documents of a bucket or hub that are read where nothing else is asked for: a minute's work.
REMOTE_SAMPLE = 10_000
# A text of fewer tokens says next to nothing: C4 dropped lines of fewer than 5 words (Raffel et al. 2020,
# arXiv:1910.10683, section 2.2). A conversation's answer may be a word, but not none.
NEAR_EMPTY_TEXT_TOKENS = 5
NEAR_EMPTY_ANSWER_TOKENS = 1
# Of a pair's two answers together, one of whose end tokens is counted among them.
_NEAR_EMPTY_TOKENS = {CHAT: NEAR_EMPTY_ANSWER_TOKENS, PREFERENCE: NEAR_EMPTY_ANSWER_TOKENS + 1}
NUM_BINS = 16
_DOCUMENTS_PER_REPORT = 256  # of progress


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of documents, in tokens, end token included. Quantiles are lengths that occur (nearest rank)."""

    minimum: int
    mean: float
    median: int
    p90: int
    p99: int
    maximum: int
    standard_deviation: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """counts[i] documents have edges[i] to edges[i + 1] - 1 tokens; edges are evenly spaced in their logarithm."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetAnalysis:
    """A data set, or (`is_complete` False) its first documents.

    num_samples: documents, conversations, or pairs of answers, that hold tokens; a pair counts as one document.
    `num_samples_in_all` is num_samples where all was read, else estimated from the bytes read, None where they do not
    tell. `num_duplicates`: documents less different ones.
    `lengths_found` [n] ascending and `length_counts` [n]: how many documents have which length.
    """

    name: str
    kind: str  # one of KINDS, or 'tokens' where nothing says which
    num_samples: int
    num_samples_in_all: int | None
    is_complete: bool
    num_tokens: int
    num_target_tokens: int
    lengths: Lengths
    histogram: Histogram
    num_duplicates: int
    duplicates_are_estimated: bool
    duplicates: tuple[str, ...]
    num_near_empty: int
    near_empty: tuple[str, ...]
    num_malformed: int
    malformed: tuple[str, ...]
    lengths_found: NDArray[np.int64] = field(repr=False, compare=False)
    length_counts: NDArray[np.int64] = field(repr=False, compare=False)

    @property
    def is_fine_tuning(self) -> bool:
        """Whether answers are learnt, to what is not."""
        return self.kind in (CHAT, PREFERENCE)

    def epochs(self, num_steps: int, samples_per_step: int) -> float | None:
        """Passes over the data when each sequence holds one sample; None where the number of samples is not known."""
        return None if self.num_samples_in_all is None else num_steps * samples_per_step / self.num_samples_in_all

    def to_json(self) -> dict[str, Any]:
        arrays = ("lengths_found", "length_counts")
        return {one.name: _plain(getattr(self, one.name)) for one in dataclasses.fields(self) if one.name not in arrays}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def analyze(
    documents: Iterable[Measured | Malformed],
    *,
    name: str,
    kind: str,
    limit: int | None,
    total_bytes: int,
    progress: Callable[[Progress], None] | None = None,
) -> DatasetAnalysis:
    """Count the first `limit` documents (None: all), of an input of `total_bytes` as `Measured.read_bytes` counts.

    DataError: no document holds a token.
    """
    tally = Tally(_NEAR_EMPTY_TOKENS.get(kind, NEAR_EMPTY_TEXT_TOKENS))
    is_complete = True
    for document in documents:
        if tally.num_rows == limit:
            is_complete = False  # there is one more
            break
        tally.add(document)
        if progress is not None and tally.num_rows % _DOCUMENTS_PER_REPORT == 0:
            progress(tally.progress(total_bytes, limit))
    if not tally.lengths:
        found = f"{tally.num_malformed} malformed rows, such as {tally.malformed[0]}" if tally.malformed else "no text"
        raise DataError(f"--dataset={name}: found {found}; expected documents that hold text")
    lengths_found, counts = (
        np.array(part, dtype=np.int64) for part in zip(*sorted(tally.lengths.items()), strict=True)
    )
    num_duplicates, examples = tally.hashes.duplicates()
    num_samples = int(counts.sum())
    return DatasetAnalysis(
        name=name,
        kind=kind,
        num_samples=num_samples,
        num_samples_in_all=num_samples if is_complete else tally.estimated_samples(total_bytes),
        is_complete=is_complete,
        num_tokens=int(lengths_found @ counts),
        num_target_tokens=tally.num_target_tokens,
        lengths=_lengths(lengths_found, counts),
        histogram=_histogram(lengths_found, counts),
        num_duplicates=num_duplicates,
        duplicates_are_estimated=tally.hashes.is_sample,
        duplicates=examples,
        num_near_empty=tally.num_near_empty,
        near_empty=tuple(tally.near_empty),
        num_malformed=tally.num_malformed,
        malformed=tuple(tally.malformed),
        lengths_found=lengths_found,
        length_counts=counts,
    )


def analyze_dataset(
    data: DataConfig,
    *,
    sample: int | None,
    num_processes: int,
    progress: Callable[[Progress], None] | None = None,
) -> list[tuple[DatasetAnalysis, Fraction | None]]:
    """What `data.dataset` names, each data set of a mixture with its weight (None: none given).

    Training data only, where some files are named val. `sample`: read so many documents of each, from its beginning;
    None: all, but REMOTE_SAMPLE of what lies in a bucket or hub. Errors: as `open.resolve_text` and reading raise.
    """
    named = [(data.dataset, None)] if Path(data.dataset).exists() else parse_dataset(data.dataset)
    found = []
    for name, weight in named:
        folder = bins_folder(name)
        if folder is not None:
            found.append((_analyze_bins(name, folder, data, sample, progress), weight))
        else:
            found.append((_analyze_text(resolve_text(name, data), sample, num_processes, progress), weight))
    return found


def _analyze_text(
    text: Text, sample: int | None, num_processes: int, progress: Callable[[Progress], None] | None
) -> DatasetAnalysis:
    files = text.of_split("train")
    total_bytes = sum(file.size_bytes for file in files)
    limit = REMOTE_SAMPLE if sample is None and any("://" in file.location for file in files) else sample
    # One more than is counted tells whether there is more. For a few documents no processes need to be started.
    num_processes = 1 if limit is not None else max(1, min(num_processes, total_bytes // BYTES_PER_PROCESS))
    documents = text_documents(
        files, text.encoder, num_processes=num_processes, limit=None if limit is None else limit + 1
    )
    with contextlib.closing(documents):
        return analyze(
            documents, name=text.name, kind=text.encoder.kind, limit=limit, total_bytes=total_bytes, progress=progress
        )


def _analyze_bins(
    name: str, folder: Path, data: DataConfig, sample: int | None, progress: Callable[[Progress], None] | None
) -> DatasetAnalysis:
    source, _ = open_bins(folder, data.tokenizer)
    kind = source.kind if isinstance(source, TokenBins) else "tokens"
    documents = bins_documents(source, name=f"{name} train", limit=None if sample is None else sample + 1)
    total_bytes = source.num_tokens * numpy_dtype(dtype_for(source.vocab_size)).itemsize
    found = analyze(documents, name=name, kind=kind, limit=sample, total_bytes=total_bytes, progress=progress)
    if is_nanogpt(folder):
        return found
    return dataclasses.replace(found, num_malformed=read_meta(folder).num_malformed_rows)


def _lengths(found: NDArray[np.int64], counts: NDArray[np.int64]) -> Lengths:
    total = int(counts.sum())
    mean = float(found @ counts) / total
    ranks = np.cumsum(counts)

    def quantile(share: float) -> int:
        return int(found[np.searchsorted(ranks, math.ceil(share * total))])

    return Lengths(
        minimum=int(found[0]),
        mean=mean,
        median=quantile(0.5),
        p90=quantile(0.9),
        p99=quantile(0.99),
        maximum=int(found[-1]),
        standard_deviation=math.sqrt(float((found - mean) ** 2 @ counts) / total),
    )


def _histogram(found: NDArray[np.int64], counts: NDArray[np.int64]) -> Histogram:
    low, high = int(found[0]), int(found[-1]) + 1
    edges = np.unique(np.round(np.geomspace(low, high, NUM_BINS + 1)).astype(np.int64))
    held, _ = np.histogram(found, bins=edges, weights=counts)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(held.astype(np.int64).tolist()))
