"""`hypershard data analyze DATASET`: what is in a data set, and what a training would make of it."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.checks import accumulation_steps
from ..config.flags import coerce
from ..config.schema import SETTINGS, DataConfig
from ..data.kinds import CHAT, PREFERENCE
from ..errors import ConfigError
from ..storage import local_path
from ..units import format_count
from .prepare import shown_progress

if TYPE_CHECKING:
    from ..data.analysis.advice import Fit, Plan, Use
    from ..data.analysis.analyze import DatasetAnalysis
    from ..data.analysis.repetition import DataWarning

_DESCRIPTION = """\
Count the documents (or conversations, or pairs of answers) of a data set: how long they are, how many occur twice,
hold next to nothing or cannot be read. A pair is as long as both of its answers, each with the prompt before it.
With --max_context_width, how they fit into sequences; and how often a training would read them. Reads whatever
`hypershard train --dataset` reads; of a bucket or hub only the first 10,000 documents, unless --sample says more.
Nothing is written but the picture.
"""
_EXAMPLES = """\
examples:
  hypershard data analyze embedded
  hypershard data analyze chats.jsonl --tokenizer models/llama3_8b --max_context_width 3072 --max_steps 200 \\
    --gradient_accumulation_steps 64
  hypershard data analyze data/slimpajama --max_context_width 4096 --epochs 2 --global_batch_tokens 524288 --num_gpus 8
  hypershard data analyze allenai/c4 --dataset_config_name en --sample 2000 --picture lengths.png
"""
# Settings of training that mean the same here.
_DATA_SETTINGS = (
    "tokenizer",
    "data_kind",
    "text_field",
    "messages_field",
    "chat_template",
    "dataset_config_name",
    "cache_dir",
    "packing",
    "long_documents",
    "train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_tokens",
    "epochs",
)
_OTHER_SETTINGS = ("max_context_width", "max_steps")
_NEED_CONTEXT = (
    *("packing", "long_documents", "train_batch_size", "gradient_accumulation_steps", "global_batch_tokens"),
    *("epochs", "max_steps", "num_gpus"),
)
_BLOCKS = " ▏▎▍▌▋▊▉█"  # eighths of a character
_LEAST_BAR, _MOST_BAR = 10, 60


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "analyze",
        help="what is in a data set, before training on it",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help=SETTINGS["dataset"][1].metadata["help"].replace("%", "%%"))
    for name in (*_DATA_SETTINGS, *_OTHER_SETTINGS):
        field = SETTINGS[name][1]
        has_default = field.default is not None and name not in _OTHER_SETTINGS
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar="|".join(field.metadata["choices"]) or ("TEXT" if "str" in str(field.type) else "N"),
            help=(field.metadata["help"] + (f" (default: {field.default})" if has_default else "")).replace("%", "%%"),
        )
    parser.add_argument(
        "--num_gpus", type=int, default=argparse.SUPPRESS, metavar="N", help="GPUs of the training (default: 1)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="read the first N documents only (default: all of local files, 10,000 of a bucket or hub)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--picture", metavar="FILE", help="also draw the lengths, as FILE.png or FILE.svg")
    parser.set_defaults(do=analyze)


def analyze(args: argparse.Namespace) -> int:
    """Print the analysis; 0 when done. ConfigError, DataError and StorageError are for the caller to show."""
    data, plan = _data(args), _plan(args)
    if args.sample is not None and args.sample < 1:
        raise ConfigError(f"--sample={args.sample}: expected at least 1")
    picture = None if args.picture is None else local_path(args.picture, flag="--picture")
    if picture is not None:
        from ..report.pictures import require_picture

        require_picture(picture)
    from ..data.analysis.advice import mixture_warnings, uses_of, warnings
    from ..data.analysis.analyze import analyze_dataset
    from ..data.bins.encoding_pool import num_cores

    with shown_progress() as progress:
        found = analyze_dataset(data, sample=args.sample, num_processes=num_cores(), progress=progress)
    analyses, weights = [analysis for analysis, _ in found], [weight for _, weight in found]
    uses: Sequence[Use | None] = [None] * len(found)
    told: list[DataWarning] = []
    if plan is not None:
        uses = known = uses_of(analyses, [_fit(one, data, plan) for one in analyses], weights, plan)
        told = mixture_warnings(analyses, known)
    for analysis, use in zip(analyses, uses, strict=True):
        told += warnings(analysis, use, is_fine_tuning=analysis.is_fine_tuning)
    if args.json:
        print(json.dumps(_as_json(analyses, uses, plan, told)))
    else:
        width = shutil.get_terminal_size().columns
        for analysis, use in zip(analyses, uses, strict=True):
            print("\n".join(_described(analysis, use, plan, width)), end="\n\n")
        print("\n".join(_told(told, width)))
    if picture is not None:
        _draw(picture, analyses, plan)
    return 0


def _data(args: argparse.Namespace) -> DataConfig:
    given = {name: coerce(name, getattr(args, name), where=f"--{name}") for name in _DATA_SETTINGS if name in args}
    # A malformed row is counted here, whatever a training would do.
    return DataConfig(dataset=args.dataset, malformed_rows="skip", **given)


def _plan(args: argparse.Namespace) -> Plan | None:
    """None without --max_context_width. ConfigError: flags that need it, or a batch that is no whole number."""
    from ..data.analysis.advice import Plan

    if "max_context_width" not in args:
        given = [name for name in _NEED_CONTEXT if name in args]
        if given:
            raise ConfigError(f"--{given[0]}: found no --max_context_width, the length of a sequence, beside it")
        return None
    context_tokens = coerce("max_context_width", args.max_context_width, where="--max_context_width")
    num_gpus = getattr(args, "num_gpus", 1)
    if num_gpus < 1:
        raise ConfigError(f"--num_gpus={num_gpus}: expected at least 1")
    data = _data(args)
    if data.global_batch_tokens is not None and data.gradient_accumulation_steps is not None:
        raise ConfigError("--global_batch_tokens works out gradient_accumulation_steps; give one of the two")
    accumulation = accumulation_steps(data, context_tokens=context_tokens, world_size=num_gpus)
    return Plan(
        context_tokens=context_tokens,
        samples_per_step=data.train_batch_size * accumulation * num_gpus,
        num_steps=coerce("max_steps", getattr(args, "max_steps", None), where="--max_steps"),
        epochs=data.epochs,
    )


def _fit(analysis: DatasetAnalysis, data: DataConfig, plan: Plan) -> Fit:
    """As training would pack it."""
    from ..data.analysis.advice import fit_of
    from ..data.sequences import packing_of

    packed = packing_of(data, kind=analysis.kind, is_stream=False)
    return fit_of(analysis, context_tokens=plan.context_tokens, **vars(packed))


def _as_json(
    analyses: Sequence[DatasetAnalysis], uses: Sequence[Use | None], plan: Plan | None, told: Sequence[DataWarning]
) -> dict[str, Any]:
    return {
        "plan": None if plan is None else asdict(plan),
        "datasets": [
            {**analysis.to_json(), "use": None if use is None else asdict(use)}
            for analysis, use in zip(analyses, uses, strict=True)
        ],
        "warnings": [asdict(one) for one in told],
    }


def _draw(picture: Path, analyses: Sequence[DatasetAnalysis], plan: Plan | None) -> None:
    from ..report.pictures import draw_lengths

    for number, analysis in enumerate(analyses):
        path = picture if number == 0 else picture.with_stem(f"{picture.stem}-{number + 1}")
        draw_lengths(
            path,
            analysis.histogram.edges,
            analysis.histogram.counts,
            title=f"{analysis.name}: {analysis.num_samples:,} {_unit(analysis)}",
            unit=_unit(analysis),
            context_tokens=None if plan is None else plan.context_tokens,
        )


# --- for people


def _unit(analysis: DatasetAnalysis) -> str:
    return {CHAT: "conversations", PREFERENCE: "pairs"}.get(analysis.kind, "documents")


def _described(analysis: DatasetAnalysis, use: Use | None, plan: Plan | None, width: int) -> list[str]:
    unit = _unit(analysis)
    if analysis.is_complete:
        scope = "all of them read"
    elif analysis.num_samples_in_all is None:
        scope = "the first ones, of how many is not known"
    else:
        scope = f"the first ones, of about {format_count(analysis.num_samples_in_all)}"
    counted = (
        f", of which the loss counts {format_count(analysis.num_target_tokens)} "
        f"({analysis.num_target_tokens / analysis.num_tokens:.1%})"
        if analysis.is_fine_tuning
        else ""
    )
    lengths = analysis.lengths
    lines = [
        f"{analysis.name}: {analysis.num_samples:,} {unit}, {scope}",
        f"  tokens      {analysis.num_tokens:,}{counted}",
        f"  lengths     min {lengths.minimum:,}   median {lengths.median:,}   mean {lengths.mean:,.1f}   "
        f"p90 {lengths.p90:,}   p99 {lengths.p99:,}   max {lengths.maximum:,}",
        f"              standard deviation {lengths.standard_deviation:,.1f}",
    ]
    about = "about " if analysis.duplicates_are_estimated else ""
    for name, count, examples in (
        ("duplicates", analysis.num_duplicates, analysis.duplicates),
        ("near-empty", analysis.num_near_empty, analysis.near_empty),
        ("malformed", analysis.num_malformed, analysis.malformed),
    ):
        share = f" ({count / (analysis.num_samples + count):.1%})" if name == "malformed" and count else ""
        share = share or (f" ({count / analysis.num_samples:.1%})" if count else "")
        lines.append(f"  {name:<11} {about if name == 'duplicates' else ''}{count:,}{share}")
        lines += [f"              {_visible(example)}" for example in examples]
    lines += ["", *_histogram(analysis, width, context_tokens=None if plan is None else plan.context_tokens)]
    if plan is not None and use is not None:
        lines += ["", *_fits(analysis, plan), "", *_use(analysis, use, plan)]
    return lines


def _visible(text: str) -> str:
    """Rows may hold anything; a terminal is not to be steered by them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _histogram(analysis: DatasetAnalysis, width: int, *, context_tokens: int | None) -> list[str]:
    """Bars of the lengths, as wide as the terminal allows; an arrow shows where the context ends."""
    edges, counts = analysis.histogram.edges, analysis.histogram.counts
    digits, largest = len(f"{edges[-1] - 1:,}"), max(counts)
    taken = 2 * digits + len(" -  │ ") + len(f" {largest:,}  100.0%  ◂ context") + 2
    room = min(_MOST_BAR, max(_LEAST_BAR, width - taken))
    lines = [f"  {'tokens':>{2 * digits + 3}} │ {_unit(analysis)}"]
    for low, end, count in zip(edges, edges[1:], counts, strict=False):
        eighths = -(-count * room * 8 // largest) if count else 0
        bar = _BLOCKS[-1] * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        here = "  ◂ context" if context_tokens is not None and low <= context_tokens < end else ""
        lines.append(
            f"  {low:>{digits},} - {end - 1:>{digits},} │{bar:<{room}} {count:>{len(f'{largest:,}')},}  "
            f"{count / analysis.num_samples:6.1%}{here}"
        )
    return lines


def _fits(analysis: DatasetAnalysis, plan: Plan) -> list[str]:
    """What each way of packing would do."""
    from ..data.analysis.advice import fit_of

    unit = _unit(analysis)
    lines = [f"  sequences of {plan.context_tokens:,} tokens"]
    # A pair stays whole.
    ways = [] if analysis.kind == PREFERENCE else [("concat", "split")]
    all_long = ("drop",) if analysis.kind == PREFERENCE else ("split", "truncate", "drop")
    ways += [(packing, long_documents) for packing in ("best_fit", "none") for long_documents in all_long]
    for packing, long_documents in ways:
        fit = fit_of(analysis, context_tokens=plan.context_tokens, packing=packing, long_documents=long_documents)
        way = "concat" if packing == "concat" else f"{packing}, {long_documents}"
        number = "" if fit.num_sequences is None else f"{format_count(fit.num_sequences)} sequences, "
        said = f"{number}{fit.padding_share:.1%} padding"
        done = {"split": "split", "truncate": "cut short", "drop": "left out"}[long_documents]
        said += f", {fit.cut_documents_share:.1%} of {unit} {done}"
        said += f", {fit.lost_tokens_share:.2%} of tokens lost" if fit.lost_tokens_share else ""
        lines.append(f"    {way:<20} {said}")
    lines.append(f"    {fit.num_long:,} {unit} ({fit.num_long / analysis.num_samples:.1%}) are longer than that")
    return lines


def _use(analysis: DatasetAnalysis, use: Use, plan: Plan) -> list[str]:
    fit = use.fit
    way = fit.packing if fit.packing == "concat" else f"{fit.packing}, long ones: {fit.long_documents}"
    share = f", {use.share:.0%} of them from here" if use.share < 1 else ""
    lines = [f"  plan: {plan.samples_per_step:,} sequences a step ({way}){share}"]
    if use.steps_per_epoch is None:
        return [*lines, "    how many steps read all of it is not known; a larger --sample may tell"]
    about = "" if analysis.is_complete else "about "
    lines.append(f"    {about}{use.steps_per_epoch:,.1f} steps an epoch")
    if use.num_steps is not None and use.num_tokens_seen is not None and use.epochs is not None:
        seen = format_count(use.num_tokens_seen)
        lines.append(f"    {use.num_steps:,} steps: {about}{use.epochs:.2f} epochs, {seen} tokens seen")
        if analysis.is_fine_tuning and use.unpacked_epochs is not None and fit.packing != "none":
            one = _unit(analysis).removesuffix("s")
            lines.append(f"    not packed, one {one} a sequence: {about}{use.unpacked_epochs:.2f} epochs")
    return lines


def _told(told: Sequence[DataWarning], width: int) -> list[str]:
    if not told:
        return ["nothing to warn of"]
    lines = ["warnings"]
    for one in told:
        lines += textwrap.wrap(str(one), max(40, width), initial_indent="  - ", subsequent_indent="    ")
    return lines
