from __future__ import annotations

import io

import chat_shapes as shapes
import pytest
from chat_shapes import assistant, chat_spec, line, user
from rich.console import Console
from test_encode import piece, text_spec

from hypershard.data.encode import inspect
from hypershard.data.encode.inspect import show


def shown(documents, spec, *, limit=10, **console):
    output = io.StringIO()
    show(documents, spec, limit=limit, console=Console(file=output, width=100, **console))
    return output.getvalue()


@pytest.fixture
def chat(tmp_path):
    return chat_spec(tmp_path, shapes.CHATML)


TURNS = line({"messages": [user("Hi"), assistant("Hello ☃"), user("And?"), assistant("So")]}, number=4)


def test_without_colour_what_counts_stands_in_brackets(chat):
    text = shown([TURNS], chat)
    assert "a.jsonl line 4" in text and "\x1b" not in text
    assert "<|im_start|>assistant\n[[Hello ☃<|im_end|>]]\n<|im_start|>user\nAnd?" in text
    (encoded,) = chat.build().encode([TURNS])
    num_counted = int(encoded.targets.sum())
    assert f"{encoded.tokens.size} tokens; the loss counts {num_counted} (" in text


def test_with_colour_what_counts_is_green_and_the_rest_dim(chat):
    text = shown([TURNS], chat, force_terminal=True, color_system="standard", no_color=False)
    assert "[[" not in text
    counted = [part.split("\x1b[0m")[0] for part in text.split("\x1b[")[1:] if part.split("m")[0].endswith("32")]
    assert "".join(part.split("m", 1)[1] for part in counted) == "Hello ☃<|im_end|>So<|im_end|>"
    assert "\x1b[2m<|im_start|>" in text


def test_no_color_is_heeded_on_a_terminal(chat):
    text = shown([TURNS], chat, force_terminal=True, no_color=True)
    assert "[[Hello ☃<|im_end|>]]" in text


def test_plain_text_counts_wholly_and_pieces_are_one_document():
    pieces = [piece("one two\n", ends_document=False), piece("three")]
    text = shown(pieces, text_spec())
    assert text.count("a.txt line 1") == 1 and "one two\nthree<|endoftext|>" in text
    assert "the loss counts all of them" in text and "[[" not in text


def test_no_more_documents_are_read_than_shown():
    def endless():
        while True:
            yield line({"text": "again"})

    assert shown(endless(), text_spec(), limit=3).count("again<|endoftext|>") == 3
    assert shown(endless(), text_spec(), limit=0) == ""


def test_malformed_and_empty_rows_say_so(chat):
    text = shown([line({"messages": []}), TURNS], chat)
    assert "malformed: found no messages" in text and "[[So<|im_end|>]]" in text
    assert "no text: left out" in shown([line({"text": "  "})], text_spec())


def test_a_text_cannot_steer_the_terminal():
    text = shown([line({"text": "red \x1b[31m [bold]alert[/bold]"})], text_spec())
    assert "\x1b" not in text and "\\x1b[31m [bold]alert[/bold]" in text


def test_long_documents_are_cut_short(monkeypatch):
    monkeypatch.setattr(inspect, "MOST_TOKENS_SHOWN", 5)
    text = shown([line({"text": "word " * 50})], text_spec())
    assert "more tokens" in text and text.count("word") < 6
