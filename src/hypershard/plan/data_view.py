"""The data set of a plan: how large it is, how often the plan reads it, and what speaks against that.

Nothing is tokenised or read through: sizes come from the user, from meta.json of token bins, or from what
`hypershard data analyze --json` wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.analysis.repetition import DataWarning, Passes, repetition_warnings, small_set_warnings
from ..data.bins.meta import META_FILE, read_meta
from ..data.kinds import CHAT, PREFERENCE
from ..errors import ConfigError
from ..units import format_count
from .window.fit import Samples
from .window.profiles import read_object

# Of an analysis's warnings, those of the rows themselves; the others are of the plan that it was asked about.
_ROW_WARNINGS = ("malformed", "duplicates", "near_empty")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What an analysis found: packed so, a data set fills `num_sequences` of `context_tokens`."""

    packing: str
    context_tokens: int
    num_sequences: float


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of a data set, and `source`, where from; None: not known.

    `packed`: how many sequences it fills, as analysed. `is_estimated`: from a part of it.
    """

    source: str
    num_samples: int | None
    num_tokens: int | None
    longest_tokens: int | None
    is_fine_tuning: bool
    is_estimated: bool = False
    packed: Packed | None = None
    vocab_size: int | None = None
    warnings: tuple[DataWarning, ...] = ()

    @property
    def mean_tokens(self) -> float | None:
        """Of a sample."""
        return self.num_tokens / self.num_samples if self.num_samples and self.num_tokens else None

    def num_sequences(self, context_tokens: int, packing: str | None) -> float | None:
        """Sequences in one pass over it, packed as `packing` (None: by default): as analysed; else a sample each
        with 'none', and without padding with others. Of longer samples the rest is cut off where they are
        conversations."""
        found = self.packed
        if found is not None and found.context_tokens == context_tokens and _alike(found.packing, packing):
            return found.num_sequences
        if packing == "none":
            return self.num_samples
        if self.is_fine_tuning and self.num_samples is not None and self.mean_tokens is not None:
            samples = Samples(num_samples=self.num_samples, avg_tokens_per_sample=self.mean_tokens)
            return samples.num_sequences(context_tokens)
        return None if self.num_tokens is None else self.num_tokens / context_tokens


def _alike(one: str, other: str | None) -> bool:
    return (one == "none") == (other == "none")


def told_facts(*, num_samples: int | None, tokens_per_sample: float | None, dataset_tokens: int | None) -> DataFacts:
    """What the user said. Raises ConfigError where the three cannot all be given."""
    given = {"num_samples": num_samples, "tokens_per_sample": tokens_per_sample, "dataset_tokens": dataset_tokens}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if tokens_per_sample is not None and (num_samples is None or dataset_tokens is not None):
        raise ConfigError(f"{' '.join(named)}: expected --tokens_per_sample with --num_samples, or --dataset_tokens")
    if num_samples is not None and tokens_per_sample is not None:
        dataset_tokens = round(num_samples * tokens_per_sample)
    return DataFacts(
        source=", ".join(named),
        num_samples=num_samples,
        num_tokens=dataset_tokens,
        longest_tokens=None,
        is_fine_tuning=num_samples is not None,
    )


def bins_facts(dataset: str) -> DataFacts | None:
    """The training split of token bins, None where `dataset` is no such folder. Raises DataError for a damaged one."""
    folder = Path(dataset).expanduser()
    folder = folder.parent if folder.name == META_FILE else folder
    if "://" in dataset or not (folder / META_FILE).is_file():
        return None
    meta = read_meta(folder)
    return DataFacts(
        source=str(folder / META_FILE),
        num_samples=meta.train.num_documents,
        num_tokens=meta.train.num_tokens,
        longest_tokens=meta.longest_document_tokens,
        is_fine_tuning=meta.train.targets is not None,
        vocab_size=meta.vocab_size,
    )


def analysed_facts(path: Path) -> DataFacts:
    """What `hypershard data analyze --json` wrote. Raises ConfigError for another file, or more than one data set."""
    values = read_object(path)
    datasets = values.get("datasets")
    if not isinstance(datasets, list) or not all(isinstance(one, dict) for one in datasets):
        raise ConfigError(f"--dataset_facts={path}: expected what `hypershard data analyze DATASET --json` prints")
    if len(datasets) != 1:
        raise ConfigError(
            f"--dataset_facts={path}: found {len(datasets)} data sets, expected one; of a mixture give "
            f"--dataset_tokens, the tokens of all of them"
        )
    try:
        return _analysed(datasets[0], values["warnings"], source=str(path))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--dataset_facts={path}: incomplete or wrong at {error}; analyze the data again") from None


def _analysed(found: Mapping[str, Any], warnings: list[dict[str, str]], *, source: str) -> DataFacts:
    in_all, num_samples = found["num_samples_in_all"], found["num_samples"]
    use = found["use"]
    fit = None if use is None else use["fit"]
    packed = None
    if fit is not None and fit["num_sequences"] is not None:
        packed = Packed(**{name: fit[name] for name in ("packing", "context_tokens", "num_sequences")})
    return DataFacts(
        source=source,
        num_samples=in_all,
        num_tokens=None if in_all is None else round(found["num_tokens"] / num_samples * in_all),
        longest_tokens=found["lengths"]["maximum"],
        is_fine_tuning=found["kind"] in (CHAT, PREFERENCE),
        is_estimated=not found["is_complete"],
        packed=packed,
        warnings=tuple(DataWarning(**one) for one in warnings if one["code"] in _ROW_WARNINGS),
    )


# --- seen with a plan


@dataclass(frozen=True, kw_only=True)
class DataView:
    """The facts, how often `num_steps` (None: not known) read the data packed so, and what to look at."""

    facts: DataFacts
    packing: str | None
    num_steps: int | None
    passes: Passes
    warnings: tuple[DataWarning, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        facts = self.facts
        return {
            "source": facts.source,
            "num_samples": facts.num_samples,
            "num_tokens": facts.num_tokens,
            "mean_tokens": facts.mean_tokens,
            "longest_tokens": facts.longest_tokens,
            "is_estimated": facts.is_estimated,
            "num_steps": self.num_steps,
            **asdict(self.passes),
            "warnings": [asdict(one) for one in self.warnings],
        }


def data_view(
    facts: DataFacts, *, num_steps: int | None, samples_per_step: int, context_tokens: int, packing: str | None
) -> DataView:
    """How `num_steps` of `samples_per_step` sequences of `context_tokens`, packed so, use the data."""
    sequences = facts.num_sequences(context_tokens, packing)
    read = None if num_steps is None else num_steps * samples_per_step
    passes = Passes(
        epochs=None if read is None or sequences is None else read / sequences,
        unpacked_epochs=None if read is None or facts.num_samples is None else read / facts.num_samples,
        steps_per_epoch=None if sequences is None else sequences / samples_per_step,
    )
    warnings = list(facts.warnings)
    if facts.is_fine_tuning:
        warnings += small_set_warnings(facts.num_samples)
    warnings += repetition_warnings(passes, num_samples=facts.num_samples, is_fine_tuning=facts.is_fine_tuning)
    return DataView(facts=facts, packing=packing, num_steps=num_steps, passes=passes, warnings=tuple(warnings))


def view_lines(view: DataView) -> list[str]:
    """The view for a person, one `data` and its lines, then one line for each warning."""
    facts, passes = view.facts, view.passes
    about = "about " if facts.is_estimated else ""
    known = [
        None if facts.num_samples is None else f"{about}{facts.num_samples:,} samples",
        None if facts.num_tokens is None else f"{about}{format_count(facts.num_tokens)} tokens",
        None if facts.mean_tokens is None else f"mean {facts.mean_tokens:,.0f}",
        None if facts.longest_tokens is None else f"longest {facts.longest_tokens:,}",
    ]
    lines = [f"data     {', '.join(text for text in known if text)}   [{facts.source}]"]
    if passes.steps_per_epoch is not None:
        text = f"         an epoch is {about}{passes.steps_per_epoch:,.1f} steps"
        if view.num_steps is not None and passes.epochs is not None:
            text += f"; {view.num_steps:,} steps are {about}{passes.epochs:.2f} epochs"
        lines.append(text)
    is_told = facts.is_fine_tuning and view.num_steps is not None and passes.unpacked_epochs is not None
    if is_told and view.packing != "none":
        lines.append(
            f"         with one sample a sequence, not packed, {view.num_steps:,} steps are "
            f"{about}{passes.unpacked_epochs:.1f} epochs"
        )
    return [*lines, *(f"warning  {one}" for one in view.warnings)]


def whole_tokens(facts: DataFacts, *, context_tokens: int, packing: str | None) -> int | None:
    """Tokens of one pass as they are trained on, in sequences of `context_tokens` packed so; None: not known."""
    if facts.packed is None and not facts.is_fine_tuning and packing != "none":
        return facts.num_tokens
    sequences = facts.num_sequences(context_tokens, packing)
    return None if sequences is None else math.floor(sequences * context_tokens)
