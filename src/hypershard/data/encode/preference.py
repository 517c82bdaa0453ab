"""Pairs of answers -> two sequences of tokens, each whole, with those that the loss counts: the answers'."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..records import Encoded, Malformed, RawDocument
from .chat import ChatRenderer, Rendered
from .chat_messages import Conversation, Refused
from .chat_template import ChatTemplate
from .fields import NOT_UTF8, fields_of
from .preference_rows import CHOSEN_FIELD, PROMPT_FIELD, REJECTED_FIELD, SAME_ANSWER, TextPair, num_equal, read_pair
from .rendered import RenderedEncoder
from .tokenizer import TextTokenizer

_EXAMPLE = f'{{"{PROMPT_FIELD}": …, "{CHOSEN_FIELD}": …, "{REJECTED_FIELD}": …}}'
_NAMES = (CHOSEN_FIELD, REJECTED_FIELD)


class PreferenceEncoder:
    """Rows of two answers. A document is the chosen sequence and the rejected one behind it.

    Each sequence is tokenised as if the other were not there: a conversation as conversations are, plain text as plain
    text is. `template` None: conversations are malformed.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, *, eos_token_id: int):
        self._renderer = None if template is None else ChatRenderer(template, tokenizer.special_tokens)
        self._encoder = RenderedEncoder(tokenizer, eos_token_id=eos_token_id)

    def encode(self, documents: list[RawDocument]) -> list[Encoded | Malformed]:
        """One result for each document, in order; the tokenizer is called once for each way of writing."""
        results: list[Encoded | Malformed] = []
        written: dict[bool, list[Rendered]] = {True: [], False: []}
        ways: list[bool | Malformed] = []
        for document in documents:
            try:
                are_of_template, pair = self._rendered(document)
                written[are_of_template] += pair
                ways.append(are_of_template)
            except UnicodeEncodeError as error:
                ways.append(Malformed(where=document.where, reason=NOT_UTF8.format(error)))
            except Refused as refused:
                ways.append(Malformed(where=document.where, reason=str(refused)))
        encoded = {way: iter(self._encoder.encode(texts, are_of_template=way)) for way, texts in written.items()}
        for document, way in zip(documents, ways, strict=True):
            if isinstance(way, Malformed):
                results.append(way)
            else:
                chosen, rejected = next(encoded[way]), next(encoded[way])
                if not way:
                    _count_from_first_difference(chosen, rejected)
                results.append(_joined(document.where, chosen, rejected))
        return results

    def _rendered(self, document: RawDocument) -> tuple[bool, tuple[Rendered, Rendered]]:
        """Both sequences as text, and whether the template wrote them."""
        pair = read_pair(fields_of(document, example=_EXAMPLE), is_table=isinstance(document.content, Mapping))
        if isinstance(pair, TextPair):
            chosen, rejected = (_plain(pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        else:
            chosen, rejected = (
                self._conversation(name, conversation, pair.num_prompt_messages)
                for name, conversation in zip(_NAMES, (pair.chosen, pair.rejected), strict=True)
            )
        for rendered in (chosen, rejected):
            rendered.text.encode()
        return not isinstance(pair, TextPair), (chosen, rejected)

    def _conversation(self, name: str, conversation: Conversation, num_prompt_messages: int) -> Rendered:
        if self._renderer is None:
            raise Refused(
                "found messages, and the tokenizer has no chat template to write them; give one (--chat_template), "
                "such as that of the model's instruction-tuned version"
            )
        try:
            return self._renderer.render(conversation, num_given=num_prompt_messages)
        except Refused as refused:
            raise Refused(f"{name!r}, with its prompt: {refused}") from refused


def _plain(prompt: str, answer: str) -> Rendered:
    text = prompt + answer
    return Rendered(text=text, spans=((len(prompt), len(text)),), is_ended=False, is_answered=True)


def _count_from_first_difference(chosen: Encoded, rejected: Encoded) -> None:
    """Of plain texts, whose prompt may end inside a word: each token from the first on that is not in both counts.

    "It is" and "It isn't" are alike up to the "s", but " is" and " isn" are different tokens: with only the second of
    them counted, the two would not be measured by the same rule.
    """
    first = num_equal(chosen.tokens.tolist(), rejected.tokens.tolist())
    for sequence in (chosen, rejected):
        assert sequence.targets is not None
        sequence.targets[first:] = True


def _joined(where: str, chosen: Encoded, rejected: Encoded) -> Encoded | Malformed:
    if np.array_equal(chosen.tokens, rejected.tokens):
        return Malformed(where=where, reason=f"{SAME_ANSWER}, as tokens too")
    targets = []
    for name, sequence in zip(_NAMES, (chosen, rejected), strict=True):
        assert sequence.targets is not None
        if len(sequence.tokens) < 2 or not sequence.targets[1:].any():
            reason = (
                f"{name!r}: found {len(sequence.tokens)} tokens, none of which both follows another and is the "
                f"answer's; expected a prompt and an answer"
            )
            return Malformed(where=where, reason=reason)
        # Nothing is before the first token that it could be predicted from.
        targets.append(np.concatenate(([False], sequence.targets[1:])))
    return Encoded(
        tokens=np.concatenate((chosen.tokens, rejected.tokens)),
        targets=np.concatenate(targets),
        second_start=len(chosen.tokens),
    )
