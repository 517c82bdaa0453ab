from __future__ import annotations

import json
import lzma

from hypershard.data.embedded import CORPUS_PATH, EOS_TOKEN, VOCAB_SIZE


def test_the_corpus_is_real_text_each_document_once():
    with lzma.open(CORPUS_PATH, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert 1_500_000 < sum(map(len, texts)) < 2_500_000
    assert len(set(texts)) == len(texts) > 1000
    assert not any(EOS_TOKEN in text for text in texts)


def test_the_tokenizer_fits_the_corpus(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.backend.id_to_token(tokenizer.eos_token_id) == EOS_TOKEN
    with lzma.open(CORPUS_PATH, "rt", encoding="utf-8") as file:
        text = json.loads(file.readline())["text"]
    (ids,) = tokenizer.encode([text])
    assert tokenizer.backend.decode(ids.tolist()) == text
    assert len(text) / len(ids) > 3  # characters per token: trained on such text


def test_the_licence_goes_with_it():
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in CORPUS_PATH.with_name("LICENSE-PSF").read_text()
