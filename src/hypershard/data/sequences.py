"""From an opened data set to rows of the run's context: how documents are packed, what each source weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..config.schema import DataConfig
from ..errors import ConfigError, DataError
from ..log import logger
from .feed import Source
from .kinds import CHAT, PREFERENCE, TEXT
from .mixture import Mixture
from .open import Dataset, Member, Text
from .packs import PACKINGS, PackPlan
from .rows import Packs, Rows, Windows
from .source import TokenSource
from .stream import StreamSpec

# Weights that follow from sizes are rounded to this, so that sources take turns with a short period.
_WEIGHT_DIGITS = 1000
# What the schema's None means for kinds that are not cut wherever a sequence is full.
_DEFAULT_PACKING = {CHAT: "best_fit", PREFERENCE: "best_fit"}
_DEFAULT_LONG_DOCUMENTS = {
    (kind, packing): long for kind, long in ((CHAT, "truncate"), (PREFERENCE, "drop")) for packing in PACKINGS
}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows: settled for each source, because conversations are packed otherwise than text."""

    packing: str
    long_documents: str


def packing_of(data: DataConfig, *, kind: str, is_stream: bool) -> Packing:
    """What the settings mean for a source of `kind`. ConfigError: what packing cannot do."""
    packing = data.packing or _DEFAULT_PACKING.get(kind, "concat")
    long_documents = data.long_documents or _DEFAULT_LONG_DOCUMENTS.get((kind, packing), "split")
    if kind == PREFERENCE:
        _refuse_divided_pairs(data, Packing(packing=packing, long_documents=long_documents))
    if packing == "concat" and long_documents != "split":
        raise ConfigError(
            f"--long_documents={long_documents}: --packing=concat cuts wherever a sequence is full; "
            f"set --packing=best_fit or none"
        )
    if packing != "concat" and is_stream:
        raise ConfigError(f"--packing={packing} needs all documents before the first step; set --streaming=0")
    return Packing(packing=packing, long_documents=long_documents)


def _refuse_divided_pairs(data: DataConfig, packing: Packing) -> None:
    """Raises ConfigError for settings under which a pair of answers would not stay two whole sequences side by side."""
    wanted = {"packing": (*PACKINGS,), "long_documents": ("drop",), "document_mask": (True,)}
    for name, found in (vars(packing) | {"document_mask": data.document_mask}).items():
        if found not in wanted[name]:
            raise ConfigError(
                f"--{name}={found}: pairs of answers stay whole and side by side, and do not see each other; drop the "
                f"flag"
            )


def training_sources(dataset: Dataset, data: DataConfig, *, context_tokens: int) -> list[Source]:
    """The members as sources of the run's feed. DataError: a split shorter than one sequence, weights missing."""
    rows: list[Rows | StreamSpec] = []
    for member in dataset.members:
        if isinstance(member.train, Text):
            rows.append(_stream(member.train, data, context_tokens))
        else:
            rows.append(_rows(member.train, member, data, context_tokens, says=True))
    sources = []
    for member, weight, of_member in zip(dataset.members, _weights(dataset, rows), rows, strict=True):
        sources.append(Source(name=member.name, weight=weight, rows=of_member))
    return sources


def validation_sources(
    dataset: Dataset, data: DataConfig, sources: Sequence[Source], *, context_tokens: int
) -> tuple[list[Rows], Mixture]:
    """The validation rows of each member, and how they take turns: as in training."""
    rows = [_rows(member.val, member, data, context_tokens, says=False) for member in dataset.members]
    return rows, Mixture([source.weight for source in sources])


def _stream(text: Text, data: DataConfig, context_tokens: int) -> StreamSpec:
    packing_of(data, kind=TEXT, is_stream=True)  # refuses what a stream cannot do
    return StreamSpec(
        name=text.name,
        files=text.of_split("train"),
        encoder=text.encoder,
        seed=data.seed,
        window=data.shuffle_window,
        context_tokens=context_tokens,
        document_mask=data.document_mask,
        malformed_rows=data.malformed_rows,
        val_share=text.held_share,
    )


def _rows(source: TokenSource, member: Member, data: DataConfig, context_tokens: int, *, says: bool) -> Rows:
    packing = packing_of(data, kind=member.kind, is_stream=False)
    starts = source.document_starts
    if packing.packing == "concat":
        if data.document_mask and starts is None and source.eos_token_id is None:
            raise DataError(
                f"--document_mask=1: nothing says where the documents of {member.name} end; set --document_mask=0 or "
                f"prepare the data again"
            )
        rows: Rows = Windows(source, context_tokens=context_tokens, document_mask=data.document_mask)
    else:
        if starts is None:
            raise DataError(
                f"--packing={packing.packing}: {member.name} does not say where its documents begin; prepare it again"
            )
        plan = PACKINGS[packing.packing](
            starts, num_tokens=source.num_tokens, context_tokens=context_tokens, long_documents=packing.long_documents
        )
        _require_some(member, plan, is_training=says)
        if says:
            logger.info(_told(member, plan))
        elif plan.num_dropped_documents:
            logger.info(f"held out of {_told(member, plan)}")
        rows = Packs(source, plan, document_mask=data.document_mask)
    if says and rows.num_samples < 1:
        raise DataError(
            f"--dataset={member.name}: found {source.num_tokens} tokens to train on; "
            f"expected at least {context_tokens + 1} (--max_context_width={context_tokens} and one to predict); "
            "give more text or a smaller --max_context_width"
        )
    return rows


def _require_some(member: Member, plan: PackPlan, *, is_training: bool) -> None:
    """Raises DataError where documents are there and none is left: a loss of nothing would be the lowest of all."""
    if plan.num_packs or not plan.num_dropped_documents:
        return
    unit = "pairs of answers" if member.kind == PREFERENCE else "documents"
    raise DataError(
        f"--dataset={member.name}: all {plan.num_dropped_documents:,} {unit} {'' if is_training else 'held out '}are "
        f"longer than a sequence of --max_context_width={plan.context_tokens} tokens and dropped; expected some that "
        f"fit, pairs with both answers and the prompt before each; give a larger --max_context_width"
        + ("" if is_training else ", or files named val")
    )


def _told(member: Member, plan: PackPlan) -> str:
    """What packing did to a source, for people: nothing is cut or padded in silence."""
    unit = "pairs of answers" if member.kind == PREFERENCE else "documents"
    pieces = unit if member.kind == PREFERENCE else f"pieces of {unit}"
    said = f"{member.name}: {len(plan.piece_starts):,} {pieces} in {plan.num_packs:,} sequences"
    said += f", {plan.padding_share:.1%} padding"
    for count, what in (
        (plan.num_split_documents, "split over several sequences"),
        (plan.num_truncated_documents, "truncated"),
        (plan.num_dropped_documents, "dropped"),
        (plan.num_short_documents, "of a single token left out"),
    ):
        said += f"; {count:,} {unit} {what}" if count else ""
    return said + (f"; {plan.num_cut_tokens:,} tokens cut off in all" if plan.num_cut_tokens else "")


def _weights(dataset: Dataset, rows: Sequence[Rows | StreamSpec]) -> list[Fraction]:
    """As given; else each source's share of all samples, so that all come to their end together."""
    if len(rows) == 1:
        return [Fraction(1)]
    given = [member.weight for member in dataset.members if member.weight is not None]
    if given:
        return given
    sizes = [of_member.num_samples for of_member in rows if not isinstance(of_member, StreamSpec)]
    if len(sizes) < len(rows):
        raise DataError("--dataset: a stream's length is not known; give each data set a weight, as in a:0.7,b:0.3")
    total = sum(sizes)
    return [Fraction(max(1, round(size * _WEIGHT_DIGITS / total)), _WEIGHT_DIGITS) for size in sizes]
