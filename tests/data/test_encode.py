from __future__ import annotations

import pickle

import chat_shapes as shapes
import numpy as np
import pytest
from chat_shapes import assistant, chat_spec, line, marked, save_tokenizer, table_row, user
from data_texts import documents
from tokenizers import Tokenizer, models, pre_tokenizers

from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.encoder import encoder_spec, guess_kind
from hypershard.data.encode.rendered import in_spans
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.records import Encoded, Malformed, RawDocument
from hypershard.errors import DataError


def text_spec(location=TOKENIZER_PATH, **changes):
    settings = {"kind": "text", "text_field": "text", "messages_field": "messages", "chat_template": None} | changes
    return encoder_spec(tokenizer=load_tokenizer(location), **settings)


def piece(text, *, ends_document=True):
    return RawDocument(content=text, location="a.txt", number=1, ends_document=ends_document, read_bytes=0)


def test_every_kind_of_document_gives_the_same_tokens(tokenizer):
    text = "def naïve(): return '☃'\n"
    encoder = text_spec().build()
    results = encoder.encode([line({"text": text, "id": 3}), table_row({"text": text}), piece(text)])
    (expected,) = tokenizer.encode([text])
    for encoded in results:
        assert isinstance(encoded, Encoded) and encoded.targets is None and encoded.tokens.dtype == np.int64
        assert encoded.tokens.tolist() == [*expected, tokenizer.eos_token_id]


def test_one_call_gives_what_many_do_in_order(tokenizer):
    encoder = text_spec().build()
    rows = [line({"text": text}) for text in documents(30)]
    together = encoder.encode(rows)
    apart = [encoded for row in rows for encoded in encoder.encode([row])]
    assert [one.tokens.tolist() for one in together] == [one.tokens.tolist() for one in apart]
    assert tokenizer.backend.decode(together[4].tokens[:-1].tolist()) == documents(30)[4]
    assert encoder.encode([]) == []


def test_the_name_of_the_end_token_in_a_text_does_not_end_it(tokenizer):
    (encoded,) = text_spec().build().encode([line({"text": "before <|endoftext|> after"})])
    assert np.flatnonzero(encoded.tokens == tokenizer.eos_token_id).tolist() == [len(encoded.tokens) - 1]


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_rows_without_text_give_no_tokens(text):
    for encoded in text_spec().build().encode([line({"text": text}), table_row({"text": text})]):
        assert isinstance(encoded, Encoded) and encoded.tokens.size == 0


def test_only_the_last_piece_of_a_document_gets_the_end_token(tokenizer):
    pieces = [piece("one\n", ends_document=False), piece(" \n", ends_document=False), piece("")]
    first, blank, last = text_spec().build().encode(pieces)
    assert tokenizer.backend.decode([*first.tokens, *blank.tokens]) == "one\n \n"
    assert last.tokens.tolist() == [tokenizer.eos_token_id]


MALFORMED = {
    "cut": (b'{"text": "cut', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": (b'["text"]', 'found list; expected an object, such as {"text": "..."}'),
    "other keys": (b'{"content": "b"}', "found keys 'content'; expected text under 'text'; --text_field names the key"),
    "number": (b'{"text": 5}', "found int under 'text'; expected text"),
    "null": (b'{"text": null}', "found NoneType under 'text'"),
    "half a character": (b'{"text": "\\ud800"}', "cannot be written as UTF-8"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named_and_the_others_encoded(name):
    content, said = MALFORMED[name]
    good = line({"text": "fine"})
    before, malformed, after = text_spec().build().encode([good, line(content, number=3), good])
    assert isinstance(malformed, Malformed)
    assert malformed.where == "a.jsonl line 3" and said in malformed.reason
    assert before.tokens.tolist() == after.tokens.tolist() != []


def test_a_malformed_row_of_a_table_is_named():
    (malformed,) = text_spec().build().encode([table_row({"meta": 1})])
    assert malformed.where == "a.parquet row 1" and "found keys 'meta'" in malformed.reason


def test_a_spec_can_be_sent_and_says_what_is_read(tmp_path):
    text = pickle.loads(pickle.dumps(text_spec(text_field="content")))
    assert text.columns == ("content",) and not text.has_targets
    assert text.build().encode([line({"content": "a"})])[0].tokens.size == 2
    chat = pickle.loads(pickle.dumps(chat_spec(tmp_path, shapes.CHATML)))
    assert chat.columns == ("messages", "tools") and chat.has_targets
    assert chat.build().encode([line({"messages": [assistant("a")]})])[0].targets.any()


def test_the_identity_follows_what_decides_the_tokens_and_not_where_files_lie(tmp_path):
    one = text_spec(save_tokenizer(tmp_path / "one"))
    moved = text_spec(save_tokenizer(tmp_path / "two"))
    assert one.identity == moved.identity
    others = [
        text_spec(),
        text_spec(tmp_path / "one", text_field="content"),
        text_spec(save_tokenizer(tmp_path / "other_end", eos="<|eot_id|>")),
        chat_spec(tmp_path / "chat", shapes.CHATML),
        chat_spec(tmp_path / "chat2", shapes.LLAMA31),
        chat_spec(tmp_path / "chat3", shapes.LLAMA31, bos="<|begin_of_text|>"),
        chat_spec(
            tmp_path / "chat4", [{"name": "default", "template": shapes.CHATML}, {"name": "tool_use", "template": ""}]
        ),
    ]
    assert len({spec.identity for spec in (one, *others)}) == len(others) + 1
    assert text_spec(tmp_path / "one", messages_field="turns").identity == one.identity  # not read for text


def test_a_tokenizer_that_changed_meanwhile_is_refused(tmp_path):
    spec = text_spec(save_tokenizer(tmp_path))
    changed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    changed.add_tokens(["another"])
    changed.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="changed while it was used"):
        spec.build()


def test_a_template_for_plain_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"--chat_template=.*found plain text"):
        text_spec(chat_template=tmp_path / "a.jinja")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (line({"messages": []}), "chat"),
        (line({"messages": [], "text": "a"}), "chat"),
        (table_row({"messages": [user("Hi")], "text": None}), "chat"),
        (line({"messages": "Hi"}), "text"),
        (line({"text": "a"}), "text"),
        (line({"conversations": []}), "text"),
        (line(b"["), "text"),
        (line(b"[1]"), "text"),
        (piece('{"messages": []}'), "text"),
        (line({"chosen": "a", "rejected": "b"}), "preference"),
        (table_row({"chosen": [user("Hi")], "rejected": [], "text": None}), "preference"),
        (line({"chosen": "a", "rejected": "b", "messages": [user("Hi")]}), "chat"),
        (line({"chosen": "a", "rejected": "b", "text": "c"}), "text"),
        (line({"chosen": "a"}), "text"),
    ],
)
def test_the_kind_is_guessed_from_the_keys(document, expected):
    assert guess_kind(document, text_field="text", messages_field="messages") == expected


def test_a_template_that_ends_no_turn_gets_the_end_token_which_is_learnt_after_an_answer(tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    spec = chat_spec(tmp_path, template)
    answered, asked = spec.build().encode(
        [line({"messages": [user("Hi"), assistant("Hello")]}), line({"messages": [assistant("Hello"), user("Hi")]})]
    )
    assert marked(spec, answered) == "user: Hi\nassistant:⟦ Hello\n</s>⟧"
    assert marked(spec, asked) == "assistant:⟦ Hello\n⟧user: Hi\n</s>"


def test_a_template_that_ends_turns_itself_gets_no_other_end(tmp_path):
    spec = chat_spec(tmp_path, shapes.CHATML)
    (encoded,) = spec.build().encode([line({"messages": [assistant("Hello")]})])
    assert spec.eos_token_id not in encoded.tokens  # </s>; the turn ends with <|im_end|> and a line's end


def test_tokens_of_a_sentencepiece_vocabulary_keep_their_space(tmp_path):
    words = ["<unk>", "▁", "▁Hello", "▁Hi", ",", "▁you", "<s>", "</s>", "[INST]", "[/INST]"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(words[6:])
    save_tokenizer(tmp_path, shapes.LLAMA2)
    backend.save(str(tmp_path / "tokenizer.json"))
    spec = encoder_spec(
        kind="chat",
        tokenizer=load_tokenizer(tmp_path),
        text_field="text",
        messages_field="messages",
        chat_template=None,
    )
    (encoded,) = spec.build().encode([line({"messages": [user("Hi"), assistant("Hello you")]})])
    counted = [words[token] for token in encoded.tokens[encoded.targets]]
    assert counted == ["▁Hello", "▁you", "▁", "</s>"]


def test_white_space_that_ends_a_header_is_the_headers(tmp_path):
    # The tokenizer's post-processor would shorten that token to nothing, at the place where the answer begins.
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    spec = chat_spec(tmp_path, template)
    (encoded,) = spec.build().encode([line({"messages": [user("Hi"), assistant("<think>so</think>")]})])
    assert marked(spec, encoded) == "user: Hi</s>assistant: ⟦<think>so</think></s>⟧"


def test_a_token_counts_when_its_last_character_lies_in_a_span():
    #             header | answer            | next header
    offsets = np.array([[0, 4], [3, 6], [6, 8], [8, 8], [8, 10], [9, 12], [12, 12], [12, 14]])
    counted = in_spans(offsets, ((5, 10),), is_added=np.zeros(8, dtype=bool))
    assert counted.tolist() == [False, True, True, True, True, False, False, False]
    # An added token that took in the answer's white space is still the header's.
    is_added = np.array([False, True, False, False, True, False, False, False])
    counted = in_spans(offsets, ((5, 10),), is_added=is_added)
    assert counted.tolist() == [False, False, True, True, True, False, False, False]
    assert in_spans(offsets, ((0, 1), (7, 8), (12, 20)), is_added=is_added).tolist() == [
        *(False, False, True, False, False, False, True, True)
    ]
