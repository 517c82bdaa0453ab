"""Conversations -> text as the chat template writes it, and the spans of it that the model is to write itself.

The loss counts what the assistant writes: its text or tool calls and the token that ends its turn, not the header
that says whose turn it is. A template that marks this with {% generation %} is believed. For others it follows from
prefixes: messages 1 to i are written as the beginning of the whole, so the turn of message i ends where they end, and
begins where messages 1 to i - 1 with a generation prompt end.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from .chat_messages import Conversation, Refused, texts_in, with_arguments
from .chat_template import ChatTemplate, marks_generation

Spans = tuple[tuple[int, int], ...]

# Stands for an answer of which nothing is known; from the private-use area, so hardly a text begins with it.
_UNKNOWN_ANSWER = "\ue000"
# Some templates write today's date. Tokens must not depend on the day they are made, so for them it is always the one
# that Llama 3.1's template falls back to, 26 Jul 2024.
_DATE = (("%d", "26"), ("%m", "07"), ("%b", "Jul"), ("%B", "July"), ("%Y", "2024"), ("%y", "24"), ("%A", "Friday"))
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in _DATE)
    + " }}{% endmacro %}{{ '' }}"
)
_USE_MARKERS = (
    "give a template that marks what the assistant writes with {% generation %} and {% endgeneration %} "
    "(--chat_template)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A conversation as text; `spans` are the characters (from, to) that the loss counts, in order, not touching.

    `is_ended`: the text ends with a special token. `is_answered`: the last message is the assistant's.
    """

    text: str
    spans: Spans
    is_ended: bool
    is_answered: bool


class ChatRenderer:
    """Writes conversations with one template. DataError: the template is no valid Jinja."""

    def __init__(self, template: ChatTemplate, special_tokens: Collection[str]):
        self._template, self._variables = template, dict(template.variables)
        longest_first = sorted(special_tokens, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._ended = re.compile(rf"(?:{self._special.pattern})(\s*)\Z")
        self._arguments_as_text: dict[str, bool] = {}
        _compile(template)

    def render(self, conversation: Conversation, *, num_given: int = 0) -> Rendered:
        """The loss counts nothing of the first `num_given` messages.

        Refused: a special token in a message, a template that raises, leaves content out, or hides its turns.
        """
        self._refuse_forged(conversation)
        template = self._template.text_for(conversation.tools)
        messages = conversation.messages
        if any("tool_calls" in message for message in messages):
            messages = with_arguments(messages, as_text=self._wants_text_arguments(template))
        writer = _Writer(template, conversation.tools, self._variables)
        if marks_generation(template):
            text, spans = writer.write_marked(messages)
            spans = _without_given(spans, writer, messages[:num_given], text)
        else:
            text = writer.write(messages)
            _require_whole(messages, text)
            spans = self._turns(writer, messages, text, num_given=num_given)
        if not spans:
            raise Refused(f"the chat template ({self._template.source}) marks nothing of the assistant's turns")
        return Rendered(
            text=text,
            spans=spans,
            is_ended=self._ended.search(text) is not None,
            is_answered=messages[-1]["role"] == "assistant",
        )

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The messages with the header of the assistant's answer to come. Refused: as of `render`."""
        self._refuse_forged(Conversation(messages=messages, tools=tools))
        return _Writer(self._template.text_for(tools), tools, self._variables).write(messages, prompt=True)

    def end_of_turn(self) -> str | None:
        """The special token that ends an answer; None where the template writes none."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "."}
        text = _Writer(self._template.text, None, self._variables).write([question, answer])
        ended = self._ended.search(text)
        return None if ended is None else ended.group().removesuffix(ended.group(1))

    def _refuse_forged(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages, start=1):
            for text in texts_in(message):
                if found := self._special.search(text):
                    raise Refused(
                        f"message {number}: found the special token {found.group()!r} in its text, which would be read "
                        "as the template's own and forge turns; expected plain text"
                    )
        for text in texts_in(conversation.tools or ()):
            if found := self._special.search(text):
                raise Refused(f"found the special token {found.group()!r} in the tools; expected plain text")

    def _wants_text_arguments(self, template: str) -> bool:
        """Whether a template can write the arguments of tool calls only where they are text (DeepSeek-R1's)."""
        if template not in self._arguments_as_text:
            writer = _Writer(template, None, self._variables)
            self._arguments_as_text[template] = not _writes(writer, {"a": "b"}) and _writes(writer, '{"a": "b"}')
        return self._arguments_as_text[template]

    def _turns(self, writer: _Writer, messages: list[dict[str, Any]], text: str, *, num_given: int) -> Spans:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < num_given:
                continue
            so_far = writer.write(messages[: index + 1]) if index + 1 < len(messages) else text
            if not text.startswith(so_far):
                raise _unstable(index)
            end = len(so_far)
            if ended := self._ended.search(so_far):  # white space between turns is nobody's
                end = ended.start(1)
            start = _start_of_turn(writer, messages, index, text)
            if start >= end:
                raise Refused(f"message {index + 1}: the chat template writes nothing of it; {_USE_MARKERS}")
            spans.append((start, end))
        return tuple(spans)


def _without_given(spans: Spans, writer: _Writer, given: list[dict[str, Any]], text: str) -> Spans:
    """The spans behind the messages `given`, with which the conversation begins."""
    if not any(message["role"] == "assistant" for message in given):
        return spans
    before = writer.write(given)
    if not text.startswith(before):
        raise Refused(
            f"the chat template writes the {len(given)} messages of the prompt in another way when "
            f"an answer follows, so which turns are the prompt's cannot be told; give another (--chat_template)"
        )
    return tuple(span for span in spans if span[0] >= len(before))


def _start_of_turn(writer: _Writer, messages: list[dict[str, Any]], index: int, text: str) -> int:
    """Where the header of the turn of `messages[index]` ends in `text`.

    The header is the generation prompt. Where the turn does not begin with all of it (it opens a <think> that this
    turn has not), it is what they have in common. Where there is no prompt, it is what any answer would begin with.
    """
    before = messages[:index]
    try:
        # Most templates cannot write no messages at all, and some not a system prompt alone.
        plain = writer.write(before) if before else ""
        prompt = writer.write(before, prompt=True) if before else ""
    except Refused:
        plain = prompt = ""
    if not text.startswith(plain):
        raise _unstable(index)
    if len(prompt) > len(plain) and text.startswith(prompt):
        return len(prompt)
    any_answer = writer.write([*before, {"role": "assistant", "content": _UNKNOWN_ANSWER}])
    own = _common_length(any_answer, text)
    return own if prompt == plain else min(own, _common_length(prompt, text))


def _unstable(index: int) -> Refused:
    return Refused(
        f"message {index + 1}: the chat template writes the messages up to here in another way when others follow "
        f"(it may drop earlier reasoning), so where turns begin and end cannot be told; {_USE_MARKERS}"
    )


def _require_whole(messages: list[dict[str, Any]], text: str) -> None:
    """Refused when the text lacks what a user or the assistant said, or a tool call; white space may differ."""
    squeezed, place = _squeezed(text), 0
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ("user", "assistant"):
            continue  # some templates know no system prompt, or write a tool's answer as JSON
        said = [message["content"] or "", *(call["function"]["name"] for call in message.get("tool_calls", ()))]
        pieces = [_squeezed(piece) for piece in said]
        places = [squeezed.find(piece, place) for piece in pieces]
        if min(places) < 0:
            what = "a tool call" if places[0] >= 0 else "some of the content"
            raise Refused(f"message {number}: the chat template leaves out {what}; {_USE_MARKERS}")
        # Messages are written in order; the text and the calls of one may be in any.
        place = max(start + len(piece) for start, piece in zip(places, pieces, strict=True))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _common_length(one: str, other: str) -> int:
    """Characters that two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _writes(writer: _Writer, arguments: Any) -> bool:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    try:
        writer.write(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        )
    except Refused:
        return False
    return True


def _compile(template: ChatTemplate) -> None:
    from jinja2 import TemplateSyntaxError

    for text in (template.text, template.tool_text):
        if text is None:
            continue
        try:
            _render(text, messages=[], tools=None, variables={}, prompt=False, marked=False)
        except TemplateSyntaxError as error:
            raise DataError(f"--chat_template: {template.source} is no valid template: {error}") from error
        except ImportError:  # jinja2 is missing or too old for the sandbox
            raise
        except Exception:  # only its grammar is looked at; it may well refuse to write no messages
            continue


class _Writer:
    """One template with one conversation's tools."""

    def __init__(self, template: str, tools: list[dict[str, Any]] | None, variables: dict[str, str]):
        self._template, self._tools, self._variables = template, tools, variables

    def write(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """The messages as text; `prompt`: with the header of an answer to come. Refused: the template raises."""
        return self._write(messages, prompt=prompt, marked=False)[0]

    def write_marked(self, messages: list[dict[str, Any]]) -> tuple[str, Spans]:
        """The messages as text, and the characters between its marks. Refused: the template raises."""
        text, spans = self._write(messages, prompt=False, marked=True)
        return text, tuple((start, end) for start, end in spans if start < end)

    def _write(self, messages: list[dict[str, Any]], *, prompt: bool, marked: bool) -> tuple[str, Spans]:
        try:
            return _render(
                self._template,
                messages=messages,
                tools=self._tools,
                variables=self._variables,
                prompt=prompt,
                marked=marked,
            )
        except Exception as error:  # whatever a template's code may raise
            raise Refused(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error


def _render(
    template: str,
    *,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, str],
    prompt: bool,
    marked: bool,
) -> tuple[str, Spans]:
    """By transformers' renderer: a sandbox without access to files or attributes that templates have no use for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=prompt,
        **variables,
    )
    return texts[0], tuple(tuple(span) for span in spans[0]) if marked else ()
