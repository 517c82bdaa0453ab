"""A row with a chosen and a rejected answer -> what is common to both and what is not, or the reason why not.

The formats are those of TRL's preference data sets, told apart row by row:

    {"prompt": "text", "chosen": "text", "rejected": "text"}        plain text
    {"chosen": "text", "rejected": "text"}                          plain text that begins alike: that is the prompt
    {"prompt": [messages], "chosen": [messages], "rejected": […]}   conversations: the prompt's messages, then these
    {"chosen": [messages], "rejected": [messages]}                  whole conversations that begin with one prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .chat_messages import Conversation, Refused, keys_of, read_messages, read_tools, without_nulls
from .fields import TOOLS_FIELD

PROMPT_FIELD, CHOSEN_FIELD, REJECTED_FIELD = "prompt", "chosen", "rejected"
SAME_ANSWER = f"found the same under {CHOSEN_FIELD!r} and {REJECTED_FIELD!r}; expected two answers that differ"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPair:
    """Two texts that go on from one prompt."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPair:
    """Two conversations whose first `num_prompt_messages` messages are the same, and not learnt."""

    chosen: Conversation
    rejected: Conversation
    num_prompt_messages: int


def read_pair(row: Mapping[str, Any], *, is_table: bool) -> TextPair | ChatPair:
    """The two answers in a row and what they answer; a null is a key that is not there, in tables at any depth.

    Refused: another shape, no prompt, two equal answers, or one without a message of the assistant.
    """
    if is_table:
        row = without_nulls(row)
    prompt, chosen, rejected = (row.get(name) for name in (PROMPT_FIELD, CHOSEN_FIELD, REJECTED_FIELD))
    if chosen is None or rejected is None:
        raise Refused(f"found {keys_of(row)}; expected {CHOSEN_FIELD!r} and {REJECTED_FIELD!r}")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _text_pair(prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chat_pair(prompt, chosen, rejected, tools=read_tools(row.get(TOOLS_FIELD), TOOLS_FIELD))
    raise Refused(
        f"found {type(chosen).__name__} under {CHOSEN_FIELD!r} and {type(rejected).__name__} under "
        f"{REJECTED_FIELD!r}; expected two texts, or two lists of messages"
    )


def _text_pair(prompt: Any, chosen: str, rejected: str) -> TextPair:
    if chosen == rejected:
        raise Refused(SAME_ANSWER)
    if prompt is None:
        # TRL's rule: all that is alike, but for a space at its end, which belongs to the words that follow.
        length = num_equal(chosen, rejected)
        length -= chosen[:length].endswith(" ")
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if not prompt:
            raise Refused(
                f"found texts that begin differently and no {PROMPT_FIELD!r}; expected the text that both answers go "
                f"on from under {PROMPT_FIELD!r}, or at the beginning of both"
            )
    if not isinstance(prompt, str) or not prompt:
        found = "an empty text" if prompt == "" else type(prompt).__name__
        raise Refused(f"found {found} under {PROMPT_FIELD!r} beside answers that are plain texts; expected text")
    return TextPair(prompt=prompt, chosen=chosen, rejected=rejected)


def _chat_pair(prompt: Any, chosen: list[Any], rejected: list[Any], *, tools: list[dict[str, Any]] | None) -> ChatPair:
    answers = [
        read_messages(messages, where=f"{name!r} ")
        for name, messages in ((CHOSEN_FIELD, chosen), (REJECTED_FIELD, rejected))
    ]
    if answers[0] == answers[1]:
        raise Refused(SAME_ANSWER)
    given = read_messages(prompt, where=f"{PROMPT_FIELD!r} ") if isinstance(prompt, list) and prompt else []
    repeats = [answer[: len(given)] == given for answer in answers]
    if any(repeats) != all(repeats):
        raise Refused(
            f"found the messages of {PROMPT_FIELD!r} again at the beginning of one answer and not of the other; "
            f"expected them in both or in neither"
        )
    if not all(repeats):
        answers = [[*given, *answer] for answer in answers]
    num_common = len(given) or num_equal(*answers)
    if not num_common:
        raise Refused(
            f"found conversations whose first messages differ, and no messages under {PROMPT_FIELD!r}; expected "
            f"those that both answer there, or at the beginning of both"
        )
    if prompt and not isinstance(prompt, list):
        _require_said(prompt, answers[0][:num_common])
    for name, answer in zip((CHOSEN_FIELD, REJECTED_FIELD), answers, strict=True):
        if not any(message["role"] == "assistant" for message in answer[num_common:]):
            raise Refused(
                f"{name!r}: found no message of the assistant after the {num_common} of the prompt; expected an answer"
            )
    return ChatPair(
        chosen=Conversation(messages=answers[0], tools=tools),
        rejected=Conversation(messages=answers[1], tools=tools),
        num_prompt_messages=num_common,
    )


def _require_said(prompt: Any, common: list[dict[str, Any]]) -> None:
    """Some data sets repeat a user's message as text beside whole conversations (UltraFeedback's); it says no more."""
    said = [message["content"] for message in common if message["role"] == "user" and message["content"]]
    if not isinstance(prompt, str) or prompt.strip() not in (text.strip() for text in said):
        raise Refused(
            f"found {type(prompt).__name__} under {PROMPT_FIELD!r} that is not what the user says at the beginning of "
            f"both conversations; expected messages there, or none"
        )


def num_equal(one: Any, other: Any) -> int:
    """How many items (characters, messages, tokens) are the same from the first on."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)
