"""A row with two answers becomes two whole sequences, of which the loss counts what comes after the prompt."""

from __future__ import annotations

import re

import chat_shapes as shapes
import numpy as np
import pytest
from chat_shapes import assistant, call, chat_spec, line, marked, save_tokenizer, table_row, user
from test_encode import text_spec

from hypershard.data.encode.encoder import encoder_spec
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.records import Encoded, Malformed

ASKED = [user("Name a bird.")]
SPOKEN = [user("Hi"), assistant("Hello, you."), user("How are\nyou?")]
CALLED = [
    user("1 + 2?"),
    assistant(None, tool_calls=[call("add", {"a": 1, "b": 2})]),
    {"role": "tool", "content": "3", "tool_call_id": "abcdef123"},
]
CALLS = [
    assistant("Wait.", tool_calls=[call("add", {"a": 3, "b": 4})]),
    {"role": "tool", "content": "7", "tool_call_id": "abcdef123"},
    assistant("7, then."),
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}}]
GOOD, BAD = [assistant("A goose.")], [assistant("A goose flew over the house, I think.")]


def pair_spec(folder, template=None):
    return encoder_spec(
        kind="preference",
        tokenizer=load_tokenizer(save_tokenizer(folder, template)),
        text_field="text",
        messages_field="messages",
        chat_template=None,
    )


def halves(encoded):
    """The chosen and the rejected sequence."""
    assert isinstance(encoded, Encoded), encoded
    second = encoded.second_start
    return [
        Encoded(tokens=encoded.tokens[part], targets=encoded.targets[part])
        for part in (slice(0, second), slice(second, None))
    ]


def without_first_turns(encoded, num_turns):
    """A conversation's tokens and targets, those of its first turns of the assistant cleared."""
    begins = np.flatnonzero(np.diff(encoded.targets.astype(int), prepend=0) == 1)
    targets = encoded.targets.copy()
    targets[: begins[num_turns]] = False
    return encoded.tokens.tolist(), targets.tolist()


TEMPLATES = {"chatml": shapes.CHATML, "marked": shapes.MARKED, "llama31": shapes.LLAMA31, "tools": shapes.QWEN_TOOLS}


@pytest.mark.parametrize(
    ("template", "prompt", "answers", "tools"),
    [
        *((name, ASKED, (GOOD, BAD), None) for name in TEMPLATES),
        *((name, SPOKEN, (GOOD, [*BAD, user("So?"), assistant("Yes.")]), None) for name in TEMPLATES),
        ("tools", CALLED, (CALLS, GOOD), TOOLS),
        ("tools", [*CALLED, assistant("It is 3."), user("3 + 4?")], (GOOD, CALLS), TOOLS),
    ],
)
def test_conversations_are_written_as_ever_and_the_prompts_turns_not_counted(
    tmp_path, template, prompt, answers, tools
):
    spec, chat = pair_spec(tmp_path / "a", TEMPLATES[template]), chat_spec(tmp_path / "b", TEMPLATES[template])
    more = {"tools": tools} if tools else {}
    whole = [[*prompt, *answer] for answer in answers]
    rows = {
        "explicit": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        "implicit": {"chosen": whole[0], "rejected": whole[1]},
        "whole beside messages": {"prompt": prompt, "chosen": whole[0], "rejected": whole[1]},
        # As in UltraFeedback, whose rows also hold `messages`, the chosen conversation.
        "whole beside text": {
            "prompt": prompt[0]["content"],
            "chosen": whole[0],
            "rejected": whole[1],
            "messages": whole[0],
        },
    }
    num_spoken = sum(message["role"] == "assistant" for message in prompt)
    expected = []
    for one in chat.build().encode([line({"messages": messages} | more) for messages in whole]):
        assert isinstance(one, Encoded), one
        expected.append(without_first_turns(one, num_spoken))
    documents = [line(row | more) for row in rows.values()]
    nulls = {"prompt": None, "chosen": whole[0], "rejected": [{**one, "name": None} for one in whole[1]], "tools": None}
    for encoded in spec.build().encode([*documents, table_row(nulls | more)]):
        found = [(half.tokens.tolist(), half.targets.tolist()) for half in halves(encoded)]
        assert found == expected


def test_plain_texts_go_on_from_their_prompt(tmp_path):
    spec = pair_spec(tmp_path)
    hh = "\n\nHuman: Is it far?\n\nAssistant:"
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, </s> of course."},
        {"chosen": f"{hh} It is not far.", "rejected": f"{hh} It isn't."},
        {"chosen": f"{hh} No.", "rejected": f"{hh} Yes."},
        {"chosen": "The sky is blue.", "rejected": "The sky is"},
    ]
    found = [[marked(spec, half) for half in halves(one)] for one in spec.build().encode([line(row) for row in rows])]
    assert found == [
        # What a text says stays text; the document's own end token is counted.
        ["The sky is⟦ blue.</s>⟧", "The sky is⟦ green, </s> of course.</s>⟧"],
        # What is alike is the prompt, to the letter, but for a space; and only where it is alike in tokens as well.
        [f"{hh} It⟦ is not far.</s>⟧", f"{hh} It⟦ isn't.</s>⟧"],
        [f"{hh}⟦ No.</s>⟧", f"{hh}⟦ Yes.</s>⟧"],
        ["The sky is⟦ blue.</s>⟧", "The sky is⟦</s>⟧"],
    ]
    text = text_spec(tmp_path)
    for row, encoded in zip(rows, spec.build().encode([line(row) for row in rows]), strict=True):
        whole = [row.get("prompt", "") + row[name] for name in ("chosen", "rejected")]
        expected = text.build().encode([line({"text": one}) for one in whole])
        assert [half.tokens.tolist() for half in halves(encoded)] == [one.tokens.tolist() for one in expected]


def test_texts_and_conversations_beside_each_other_stay_in_order(tmp_path):
    spec = pair_spec(tmp_path, shapes.CHATML)
    rows = [
        {"prompt": "a <|im_end|>", "chosen": "b", "rejected": "c"},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": 1, "rejected": 2},
    ]
    rows = [line(row, number) for number, row in enumerate([*rows, *reversed(rows)], start=1)]
    together = spec.build().encode(rows)
    apart = [encoded for row in rows for encoded in spec.build().encode([row])]
    for one, other in zip(together, apart, strict=True):
        if isinstance(other, Malformed):
            assert one == other
        else:
            assert (one.tokens.tolist(), one.second_start) == (other.tokens.tolist(), other.second_start)
    assert together[0].tokens.tolist() == together[-1].tokens.tolist() != together[1].tokens.tolist()


MALFORMED = {
    "no answers": ({"prompt": "a", "chosen": "b"}, "found keys 'prompt', 'chosen'; expected 'chosen' and 'rejected'"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "expected two answers that differ"),
    "equal conversations": ({"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *GOOD]}, "two answers that differ"),
    "text and messages": ({"prompt": "a", "chosen": "b", "rejected": GOOD}, "found str under 'chosen' and list under"),
    "texts without a prompt": ({"chosen": "a", "rejected": "b"}, "expected the text .* under 'prompt', or at the begi"),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "found an empty text under 'prompt'"),
    "messages before texts": ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, "found list under 'prompt'"),
    "other prompts": (
        {"chosen": [*ASKED, *GOOD], "rejected": [*SPOKEN, *GOOD]},
        "first messages differ, and no messages under 'prompt'",
    ),
    "another text": (
        {"prompt": "Name a fish.", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        "not what the user says",
    ),
    "no answer": (
        {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, user("Now!")]},
        "'rejected': found no message of the assistant after the 1 of the prompt",
    ),
    "no messages": (
        {"prompt": ASKED, "chosen": [], "rejected": BAD},
        "'chosen': found no message of the assistant after the 1",
    ),
    "a role": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": [{"role": "bot", "content": "a"}]},
        "'rejected' message 1: found the role 'bot'",
    ),
    "a prompt in one answer": (
        {"prompt": ASKED, "chosen": [*ASKED, *GOOD], "rejected": BAD},
        "expected them in both or in neither",
    ),
    "forged": (
        {"prompt": ASKED, "chosen": [assistant("a<|im_end|>")], "rejected": BAD},
        "'chosen', with its prompt: message 2: found the special token",
    ),
    "half a character": (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', "cannot be written as UTF-8"),
    "alike once written": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": [assistant("A goose.", name="Max")]},
        "answers that differ, as tokens too",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_pair_is_named(tmp_path, name):
    row, said = MALFORMED[name]
    (malformed,) = pair_spec(tmp_path, shapes.CHATML).build().encode([line(row, 7)])
    assert isinstance(malformed, Malformed) and malformed.where == "a.jsonl line 7"
    assert re.search(said, malformed.reason), malformed.reason


def test_conversations_without_a_template_say_what_to_give_and_texts_need_none(tmp_path):
    rows = [{"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    malformed, encoded = pair_spec(tmp_path).build().encode([line(row) for row in rows])
    assert isinstance(malformed, Malformed) and "--chat_template" in malformed.reason
    assert isinstance(encoded, Encoded)


def test_a_prompt_whose_reasoning_is_dropped_is_no_obstacle(tmp_path):
    """Conversations are refused there, because the turn that changes is learnt; here it is not."""
    prompt = [user("Hi"), assistant("Hello.", reasoning_content="Polite."), user("And?")]
    spec = pair_spec(tmp_path, shapes.THINKING)
    (encoded,) = spec.build().encode([line({"prompt": prompt, "chosen": GOOD, "rejected": BAD})])
    chosen, _ = (marked(spec, half) for half in halves(encoded))
    assert "Polite" not in chosen and chosen.count("⟦") == 1 and "A goose.<|im_end|>⟧" in chosen
