"""Documents as they lie in files -> token ids, and which of them the loss counts: text, conversations, preferences.

An `EncoderSpec` holds all that decides the tokens and can be sent to other processes; each builds its own encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..kinds import CHAT, KINDS, PREFERENCE, TEXT
from ..records import Encoded, Encoder, Malformed, RawDocument
from .chat import ChatRenderer, Rendered
from .chat_messages import Refused, keys_of, read_conversation
from .chat_template import ChatTemplate, find_chat_template, read_chat_template
from .fields import NOT_UTF8, TOOLS_FIELD, fields_of
from .preference import PreferenceEncoder
from .preference_rows import CHOSEN_FIELD, PROMPT_FIELD, REJECTED_FIELD
from .rendered import RenderedEncoder
from .tokenizer import TextTokenizer, load_tokenizer

# Part of the identity: raised when this program makes other tokens of the same documents.
ENCODING_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How documents become tokens. `chat_template` is there for conversations, and for preferences if it was found."""

    kind: str  # one of KINDS
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
        if self.kind == PREFERENCE:
            return (PROMPT_FIELD, CHOSEN_FIELD, REJECTED_FIELD, TOOLS_FIELD)
        return (self.messages_field, TOOLS_FIELD) if self.kind == CHAT else (self.text_field,)

    @property
    def has_targets(self) -> bool:
        """Whether the loss counts some of the tokens only."""
        return self.kind != TEXT

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
        if self.kind == PREFERENCE:
            return PreferenceEncoder(tokenizer, self.chat_template, eos_token_id=self.eos_token_id)
        if self.chat_template is None:
            return _TextEncoder(tokenizer, self)
        return _ChatEncoder(tokenizer, self.chat_template, self)


def encoder_spec(
    *, kind: str, tokenizer: TextTokenizer, text_field: str, messages_field: str, chat_template: Path | None
) -> EncoderSpec:
    """What encodes documents of `kind` ('text', 'chat' or 'preference') with `tokenizer`.

    `chat_template`: a Jinja file that goes before the tokenizer's own template. DataError: conversations and no
    template, a template that cannot be read, or one given for plain text.
    """
    assert kind in KINDS, kind
    if kind == TEXT and chat_template is not None:
        raise DataError(
            f"--chat_template={chat_template}: found plain text, which has no turns; expected conversations "
            "(--data_kind=chat, and --messages_field names their key); leave the flag out for plain text"
        )
    template = None
    if kind != TEXT:
        # Pairs of plain texts need none; a row of messages says so where there is none.
        template = (read_chat_template if kind == CHAT else find_chat_template)(tokenizer, chat_template)
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


def guess_kind(document: RawDocument, *, text_field: str, messages_field: str) -> str:
    """What --data_kind=auto means: 'chat' when the document holds a list under `messages_field`, 'preference' when it
    holds a chosen and a rejected answer and nothing under either field, else 'text'.

    A row without text is text, too, so that the encoder's message says what was found.
    """
    if isinstance(document.content, str):
        return TEXT
    try:
        row = fields_of(document, example="")
    except Refused:
        return TEXT
    if isinstance(row.get(messages_field), list):
        return CHAT
    is_there = {name: row.get(name) is not None for name in (CHOSEN_FIELD, REJECTED_FIELD, messages_field, text_field)}
    is_pair = is_there[CHOSEN_FIELD] and is_there[REJECTED_FIELD]
    return PREFERENCE if is_pair and not (is_there[messages_field] or is_there[text_field]) else TEXT


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
            return Malformed(where=document.where, reason=NOT_UTF8.format(error))
        except Refused as refused:
            return Malformed(where=document.where, reason=str(refused))
        return text


def _text_of(document: RawDocument, text_field: str) -> str:
    row = fields_of(document, example=f'{{"{text_field}": "..."}}')
    text = row.get(text_field)
    if isinstance(text, str):
        return text
    found = f"{type(text).__name__} under {text_field!r}" if text_field in row else keys_of(row)
    raise Refused(f"found {found}; expected text under {text_field!r}; --text_field names the key")


class _ChatEncoder:
    """Conversations, as the chat template writes them."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate, spec: EncoderSpec):
        self._renderer = ChatRenderer(template, tokenizer.special_tokens)
        self._encoder = RenderedEncoder(tokenizer, eos_token_id=spec.eos_token_id)
        self._messages_field = spec.messages_field

    def encode(self, documents: list[RawDocument]) -> list[Encoded | Malformed]:
        """One result for each document, in order; the tokenizer is called once."""
        results = [self._rendered_or_malformed(document) for document in documents]
        rendered = [result for result in results if isinstance(result, Rendered)]
        encoded = iter(self._encoder.encode(rendered, are_of_template=True))
        return [next(encoded) if isinstance(result, Rendered) else result for result in results]

    def _rendered_or_malformed(self, document: RawDocument) -> Rendered | Malformed:
        try:
            row = fields_of(document, example=f'{{"{self._messages_field}": […]}}')
            conversation = read_conversation(
                row,
                messages_field=self._messages_field,
                tools_field=TOOLS_FIELD,
                is_table=isinstance(document.content, Mapping),
            )
            rendered = self._renderer.render(conversation)
            rendered.text.encode()
        except UnicodeEncodeError as error:
            return Malformed(where=document.where, reason=NOT_UTF8.format(error))
        except Refused as refused:
            return Malformed(where=document.where, reason=str(refused))
        return rendered
