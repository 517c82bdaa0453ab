"""Documents as they lie in files -> token ids: plain text, or conversations with the tokens that the loss counts.

An `EncoderSpec` holds all that decides the tokens and can be sent to other processes; each builds its own encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..records import Encoded, Encoder, Malformed, RawDocument
from .chat import ChatRenderer, Rendered, Spans
from .chat_messages import Refused, keys_of, read_conversation
from .chat_template import ChatTemplate, read_chat_template
from .tokenizer import TextTokenizer, load_tokenizer

# Part of the identity: raised when this program makes other tokens of the same documents.
ENCODING_VERSION = 1
TOOLS_FIELD = "tools"
KINDS = ("text", "chat")

# JSON can spell halves of characters ("\\ud800") that no text can hold.
_NOT_UTF8 = "the text cannot be written as UTF-8 ({}); mend or drop the line"


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How documents become tokens. `chat_template` is there for conversations only."""

    kind: str  # 'text' or 'chat'
    tokenizer_path: Path  # of tokenizer.json
    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    text_field: str
    messages_field: str
    chat_template: ChatTemplate | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a row that are read."""
        return (self.messages_field, TOOLS_FIELD) if self.has_targets else (self.text_field,)

    @property
    def has_targets(self) -> bool:
        """Whether the loss counts some of the tokens only."""
        return self.kind == "chat"

    @property
    def identity(self) -> str:
        """Changes when the tokens of some document may change; not when the tokenizer's files are moved."""
        template = self.chat_template and self.chat_template.parts
        parts = (ENCODING_VERSION, self.kind, self.tokenizer_sha256, self.eos_token_id, self.columns, template)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def build(self) -> Encoder:
        """The encoder, in this process. DataError: the tokenizer's file is gone or has changed."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(f"--tokenizer: {self.tokenizer_path} changed while it was used; start again")
        if self.chat_template is None:
            return _TextEncoder(tokenizer, self)
        return _ChatEncoder(tokenizer, self.chat_template, self)


def encoder_spec(
    *, kind: str, tokenizer: TextTokenizer, text_field: str, messages_field: str, chat_template: Path | None
) -> EncoderSpec:
    """What encodes documents of `kind` ('text' or 'chat') with `tokenizer`.

    `chat_template`: a Jinja file that goes before the tokenizer's own template. DataError: conversations and no
    template, a template that cannot be read, or one given for plain text.
    """
    assert kind in KINDS, kind
    if kind == "text" and chat_template is not None:
        raise DataError(
            f"--chat_template={chat_template}: found plain text, which has no turns; expected conversations "
            "(--data_kind=chat, and --messages_field names their key); leave the flag out for plain text"
        )
    template = read_chat_template(tokenizer, chat_template) if kind == "chat" else None
    if template is not None:
        ChatRenderer(template, tokenizer.special_tokens)  # refuses a template that is none before any work is done
    return EncoderSpec(
        kind=kind,
        tokenizer_path=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        text_field=text_field,
        messages_field=messages_field,
        chat_template=template,
    )


def guess_kind(document: RawDocument, *, messages_field: str) -> str:
    """'chat' when the document holds a list under `messages_field`, else 'text': what --data_kind=auto means.

    A row without text is text, too, so that the encoder's message says what was found.
    """
    if isinstance(document.content, str):
        return "text"
    try:
        row = _row(document, example="")
    except Refused:
        return "text"
    return "chat" if isinstance(row.get(messages_field), list) else "text"


def _row(document: RawDocument, *, example: str) -> Mapping[str, Any]:
    """The fields of a JSON line or a table's row; `example` is what a good line looks like. Refused: it has none."""
    content = document.content
    if isinstance(content, Mapping):
        return content
    if isinstance(content, str):
        raise Refused(f"found plain text; expected an object, such as {example}")
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 ({error}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({error}); expected one object per line, such as {example}") from error
    if not isinstance(row, dict):
        raise Refused(f"found {type(row).__name__}; expected an object, such as {example}")
    return row


class _TextEncoder:
    """Plain text. What looks like a special token in it stays text."""

    def __init__(self, tokenizer: TextTokenizer, spec: EncoderSpec):
        self._tokenizer, self._eos_token_id, self._text_field = tokenizer, spec.eos_token_id, spec.text_field

    def encode(self, documents: list[RawDocument]) -> list[Encoded | Malformed]:
        """One result for each document, in order; the tokenizer is called once."""
        texts = [self._text_or_malformed(document) for document in documents]
        encodings = iter(self._tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        encoded: list[Encoded | Malformed] = []
        for document, text in zip(documents, texts, strict=True):
            if isinstance(text, Malformed):
                encoded.append(text)
                continue
            ids = next(encodings).ids
            if document.ends_document and (text or isinstance(document.content, str)):
                ids.append(self._eos_token_id)
            encoded.append(Encoded(tokens=np.array(ids, dtype=np.int64), targets=None))
        return encoded

    def _text_or_malformed(self, document: RawDocument) -> str | Malformed:
        """The text to encode; '' for a row without any.

        A piece of a text file is taken as it is: blank or not, it may go on or end a document begun earlier.
        """
        try:
            if isinstance(document.content, str):
                text = document.content
            else:
                text = _text_of(document, self._text_field)
                text = "" if text.isspace() else text
            text.encode()
        except UnicodeEncodeError as error:
            return Malformed(where=document.where, reason=_NOT_UTF8.format(error))
        except Refused as refused:
            return Malformed(where=document.where, reason=str(refused))
        return text


def _text_of(document: RawDocument, text_field: str) -> str:
    row = _row(document, example=f'{{"{text_field}": "..."}}')
    text = row.get(text_field)
    if isinstance(text, str):
        return text
    found = f"{type(text).__name__} under {text_field!r}" if text_field in row else keys_of(row)
    raise Refused(f"found {found}; expected text under {text_field!r}; --text_field names the key")


class _ChatEncoder:
    """Conversations, as the chat template writes them."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate, spec: EncoderSpec):
        self._renderer = ChatRenderer(template, tokenizer.special_tokens)
        self._eos_token_id, self._messages_field = spec.eos_token_id, spec.messages_field
        self._added_ids = np.array(sorted(tokenizer.backend.get_added_tokens_decoder()), dtype=np.int64)
        self._backend = tokenizer.backend
        self._backend.encode_special_tokens = False  # the template writes them
        # It would add tokens of its own or shorten offsets; what a template writes is complete.
        self._backend.post_processor = None

    def encode(self, documents: list[RawDocument]) -> list[Encoded | Malformed]:
        """One result for each document, in order; the tokenizer is called once."""
        results = [self._rendered_or_malformed(document) for document in documents]
        texts = [result.text for result in results if isinstance(result, Rendered)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            self._encoded(result, next(encodings)) if isinstance(result, Rendered) else result for result in results
        ]

    def _rendered_or_malformed(self, document: RawDocument) -> Rendered | Malformed:
        try:
            row = _row(document, example=f'{{"{self._messages_field}": […]}}')
            conversation = read_conversation(
                row,
                messages_field=self._messages_field,
                tools_field=TOOLS_FIELD,
                is_table=isinstance(document.content, Mapping),
            )
            rendered = self._renderer.render(conversation)
            rendered.text.encode()
        except UnicodeEncodeError as error:
            return Malformed(where=document.where, reason=_NOT_UTF8.format(error))
        except Refused as refused:
            return Malformed(where=document.where, reason=str(refused))
        return rendered

    def _encoded(self, rendered: Rendered, encoding: Any) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
        targets = in_spans(offsets, rendered.spans, is_added=np.isin(ids, self._added_ids))
        if not rendered.is_ended:
            ids = np.append(ids, self._eos_token_id)
            targets = np.append(targets, rendered.is_answered)
        return Encoded(tokens=ids, targets=targets)


def in_spans(offsets: NDArray[np.int64], spans: Spans, *, is_added: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which tokens [n] the loss counts: those whose last character (of `offsets` [n, 2]) lies in one of `spans`.

    So a token that begins in the header and reaches into the answer counts (" Hello", where the header ends with the
    space), but not an added token, `is_added` [n], that only took in white space after it; and a token that ends in
    the next header does not.
    """
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    # A token of no characters (a sentence's "▁") lies where it begins.
    last = np.maximum(offsets[:, 1] - 1, offsets[:, 0])
    span = np.searchsorted(edges[:, 0], last, side="right") - 1
    inside = (span >= 0) & (last < edges[span, 1])
    straddles = offsets[:, 0] < edges[span, 0]
    return inside & ~(straddles & is_added)
