"""What the model is to learn from a document, shown token by token: the quickest check of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import Encoded, Malformed, RawDocument
from .encoder import EncoderSpec
from .preference_rows import CHOSEN_FIELD, REJECTED_FIELD
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# More tokens of a document say nothing new to a reader.
MOST_TOKENS_SHOWN = 4000
_COUNTED_COLOUR = "green"
_OPEN, _CLOSE = "[[", "]]"


def show(documents: Iterable[RawDocument], spec: EncoderSpec, *, limit: int, console: Console | None = None) -> None:
    """Print the first `limit` documents as tokens, those that the loss counts in green and the others dim.

    A pair of answers is two sequences, one under the other. Every second token is underlined, so that one sees where
    they end. Without colour (NO_COLOR, or no terminal) runs of counted tokens stand between [[ and ]]. Malformed rows
    are shown with the reason. DataError: as `spec.build`.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    encoder, backend = spec.build(), load_tokenizer(spec.tokenizer_path).backend
    is_plain = not console.is_terminal or console.no_color or console.color_system is None
    pieces = _first(documents, limit)
    for pieces_of_one in pieces:
        console.rule(Text(pieces_of_one[0].where), align="left")
        encoded = _joined(encoder.encode(pieces_of_one))
        if isinstance(encoded, Malformed):
            console.print(Text(f"malformed: {_visible(encoded.reason)}", style="red"), soft_wrap=True)
            continue
        for name, sequence in _sequences(encoded):
            if name:
                console.print(Text(f"--- {name}", style="bold"))
            if sequence.tokens.size:
                console.print(_text(sequence, backend, is_plain=is_plain), soft_wrap=True)
            console.print(Text(_counts(sequence), style="bold"), soft_wrap=True)


def _first(documents: Iterable[RawDocument], limit: int) -> Iterator[list[RawDocument]]:
    """The pieces of each of the first `limit` documents."""
    pieces: list[RawDocument] = []
    num_documents = 0
    for piece in documents if limit > 0 else ():
        pieces.append(piece)
        if not piece.ends_document:
            continue
        yield pieces
        pieces, num_documents = [], num_documents + 1
        if num_documents == limit:
            return


def _sequences(encoded: Encoded) -> list[tuple[str, Encoded]]:
    """(name, tokens) of each sequence in a document; one without a name where it is no pair."""
    second = encoded.second_start
    if second is None or encoded.targets is None:
        return [("", encoded)]
    halves = ((CHOSEN_FIELD, slice(0, second)), (REJECTED_FIELD, slice(second, None)))
    return [(name, Encoded(tokens=encoded.tokens[half], targets=encoded.targets[half])) for name, half in halves]


def _joined(parts: list[Encoded | Malformed]) -> Encoded | Malformed:
    """A document from its pieces; the first malformed one, if there is one. Only text comes in several."""
    encoded: list[Encoded] = []
    for part in parts:
        if isinstance(part, Malformed):
            return part
        encoded.append(part)
    if len(encoded) == 1:
        return encoded[0]
    targets = [part.targets for part in encoded if part.targets is not None]
    return Encoded(
        tokens=np.concatenate([part.tokens for part in encoded]),
        targets=np.concatenate(targets) if targets else None,
    )


def _text(encoded: Encoded, backend: Any, *, is_plain: bool) -> Text:
    from rich.style import Style
    from rich.text import Text

    shown = encoded.tokens[:MOST_TOKENS_SHOWN].tolist()
    counted = encoded.targets[: len(shown)].tolist() if encoded.targets is not None else [True] * len(shown)
    text, was_counted = Text(), False
    for index, (token, counts) in enumerate(zip(_decoded(shown, backend), counted, strict=True)):
        if is_plain and encoded.targets is not None and counts != was_counted:
            text.append(_OPEN if counts else _CLOSE)
        was_counted = counts
        style = Style(color=_COUNTED_COLOUR) if counts else Style(dim=True)
        text.append(_visible(token), Style() if is_plain else style + Style(underline=index % 2 == 1))
    if is_plain and encoded.targets is not None and was_counted:
        text.append(_CLOSE)
    if len(shown) < encoded.tokens.size:
        text.append(f" … and {encoded.tokens.size - len(shown)} more tokens")
    return text


def _decoded(tokens: list[int], backend: Any) -> Iterator[str]:
    """The text that each token adds; '' while the bytes of a character are not complete."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    for token in tokens:
        yield stream.step(backend, token) or ""


def _visible(text: str) -> str:
    """Text that cannot steer a terminal: what cannot be printed is written as in Python."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def _counts(encoded: Encoded) -> str:
    num_tokens = encoded.tokens.size
    if not num_tokens:
        return "no text: left out"
    if encoded.targets is None:
        return f"{num_tokens} tokens; the loss counts all of them"
    num_counted = int(encoded.targets.sum())
    return f"{num_tokens} tokens; the loss counts {num_counted} ({num_counted / num_tokens:.1%})"
