from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import boto3
import chat_shapes as shapes
import numpy as np
import pyarrow as pa
import pytest
from chat_shapes import assistant, line, save_tokenizer, user
from data_texts import documents, write_jsonl
from prepared import prepared, spec_of
from pyarrow import parquet
from tests.conftest import BUCKET

from hypershard.config.schema import DataConfig
from hypershard.data.analysis import advice, tally
from hypershard.data.analysis import analyze as analysis
from hypershard.data.analysis.advice import Plan, fit_of, mixture_warnings, uses_of, warnings
from hypershard.data.analysis.analyze import DatasetAnalysis, analyze, analyze_dataset
from hypershard.data.analysis.measured import Measured
from hypershard.data.analysis.repetition import most_fine_tuning_epochs, worth_in_epochs
from hypershard.data.open import open_dataset
from hypershard.data.read import documents as reading
from hypershard.data.sequences import training_sources
from hypershard.errors import DataError


def analyzed(path, tmp_path, *, sample=None, num_processes=1, **settings) -> DatasetAnalysis:
    data = DataConfig(dataset=str(path), cache_dir=str(tmp_path / "cache"), **settings)
    ((found, _),) = analyze_dataset(data, sample=sample, num_processes=num_processes)
    return found


def made(lengths, *, kind="text", limit=None, digest=lambda number: number) -> DatasetAnalysis:
    """An analysis of documents of these lengths, all different unless `digest` says otherwise."""
    return analyze(
        (
            Measured(
                place="made line",
                number=number + 1,
                num_tokens=length,
                num_target_tokens=length,
                digest=(digest(number) * 0x9E3779B97F4A7C15 % 2**128).to_bytes(16, "little"),
                read_bytes=number + 1,
            )
            for number, length in enumerate(lengths)
        ),
        name="made",
        kind=kind,
        limit=limit,
        total_bytes=len(lengths),
    )


def codes(found):
    return [one.code for one in found]


def use_of(found, *, packing, long_documents, **plan):
    fit = fit_of(found, context_tokens=plan["context_tokens"], packing=packing, long_documents=long_documents)
    (use,) = uses_of([found], [fit], [None], Plan(**plan))
    return use


# --- counting


def test_lengths_are_the_encoders(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(150))
    encoded = spec_of().build().encode([line({"text": text}) for text in documents(150)])
    lengths = np.array([len(one.tokens) for one in encoded])
    found = analyzed(path, tmp_path)
    assert (found.num_samples, found.num_tokens) == (150, lengths.sum())
    assert found.num_target_tokens == found.num_tokens
    assert found.is_complete and found.num_samples_in_all == 150
    expected = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf").tolist()
    told = found.lengths
    assert [told.minimum, told.median, told.p90, told.p99, told.maximum] == expected
    assert told.mean == pytest.approx(lengths.mean()) and told.standard_deviation == pytest.approx(lengths.std())
    edges, counts = found.histogram.edges, found.histogram.counts
    assert counts == tuple(np.histogram(lengths, bins=edges)[0]) and sum(counts) == 150
    assert edges[0] == lengths.min() and edges[-1] == lengths.max() + 1


def test_documents_of_one_length_make_a_histogram():
    found = made([7] * 5)
    assert found.histogram.edges == (7, 8) and found.histogram.counts == (5,)


def test_processes_do_not_change_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "BYTES_PER_PROCESS", 1)
    path = write_jsonl(tmp_path / "a.jsonl", [*documents(300), *documents(20)])
    alone, together = (analyzed(path, tmp_path, num_processes=count) for count in (1, 2))
    assert alone.to_json() == together.to_json() and alone.num_duplicates == 20


def test_long_text_files_are_documents_whatever_their_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(("one two\n" * 400, "short one here", "one two\n" * 400 + "\n")))
    monkeypatch.setattr(reading, "PIECE_BYTES", 100)
    found = analyzed(path, tmp_path)
    assert found.num_samples == 3 and found.num_duplicates == 1
    assert found.duplicates == (f"{path} line 405 is the same as {path} line 1",)


def test_duplicates_are_what_the_model_sees_twice(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one two three four five", "id": 1}\n{"text": "another text as it is"}\n')
    (folder / "b.jsonl").write_text('{"id": 2, "text": "one two \\u0074hree four five"}\n')
    found = analyzed(folder, tmp_path)
    assert found.num_duplicates == 1 and not found.duplicates_are_estimated
    assert found.duplicates == (f"{folder}/b.jsonl line 1 is the same as {folder}/a.jsonl line 1",)


def test_the_first_duplicates_are_named():
    found = made([9] * 100, digest=lambda number: number % 60)
    assert found.num_duplicates == 40
    assert found.duplicates[0] == "made line 61 is the same as made line 1"
    assert found.duplicates[4] == "made line 65 is the same as made line 5" and len(found.duplicates) == 5


def test_three_copies_are_two_too_many():
    found = made([9] * 3, digest=lambda _: 1)
    assert found.num_duplicates == 2
    assert [text.split()[-1] for text in found.duplicates] == ["1", "1"]


def test_hashes_stay_bounded_and_duplicates_are_estimated_then(monkeypatch):
    monkeypatch.setattr(tally, "MOST_HASHES", 1024)
    chance = random.Random(3)
    digests = [chance.getrandbits(128) for _ in range(4000)]
    found = made([9] * 8000, digest=lambda number: digests[number % 4000])
    assert found.duplicates_are_estimated
    assert found.num_duplicates == pytest.approx(4000, rel=0.2)
    assert found.num_samples == 8000 and found.num_tokens == 72000


def test_near_empty_and_malformed_rows_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "one two three four five six seven"}', '{"text": " "}', '{"text": "a"}', "{broken", '{"id": 1}']
    path.write_text("\n".join(rows * 3) + "\n")
    found = analyzed(path, tmp_path)
    assert found.num_samples == 6, "the text and 'a', not the empty rows"
    assert found.num_near_empty == 6 and found.near_empty[:2] == (f"{path} line 2", f"{path} line 3")
    assert found.num_malformed == 6 and len(found.malformed) == 5
    assert found.malformed[0].startswith(f"{path} line 4: not JSON")
    assert {"malformed", "near_empty", "duplicates"} <= set(codes(warnings(found, None, is_fine_tuning=False)))


def test_nothing_to_count_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"other": "x"}\n')
    with pytest.raises(DataError, match=r"1 malformed rows, such as .*a\.jsonl line 1"):
        analyzed(tmp_path / "a.jsonl", tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text"):
        analyzed(tmp_path / "b.jsonl", tmp_path)


# --- kinds


def conversations(path, count):
    chance = random.Random(1)
    rows = [
        {"messages": [user(f"Question {number}"), assistant(" ".join(documents(5)[: chance.randint(1, 5)]))]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_conversations_count_what_the_loss_counts(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", shapes.CHATML)
    rows = conversations(tmp_path / "a.jsonl", 40)
    found = analyzed(tmp_path / "a.jsonl", tmp_path, tokenizer=str(tokenizer))
    encoded = shapes.chat_spec(tmp_path / "other", shapes.CHATML).build().encode([line(row) for row in rows])
    assert found.kind == "chat" and found.num_samples == 40
    assert found.num_target_tokens == sum(int(one.targets.sum()) for one in encoded) < found.num_tokens
    assert found.num_near_empty == 0 and found.num_duplicates == 0


def test_an_answer_without_words_is_near_empty(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", shapes.CHATML)
    rows = [{"messages": [user("Say?"), assistant(answer)]} for answer in ("Yes", "")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = analyzed(tmp_path / "a.jsonl", tmp_path, tokenizer=str(tokenizer))
    assert found.near_empty == (f"{tmp_path}/a.jsonl line 2",)


def test_token_bins_are_read_by_their_starts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*documents(120), *documents(10)])
    meta = prepared(path, tmp_path / "bins")
    found = analyzed(tmp_path / "bins", tmp_path)
    assert found.num_samples == meta.train.num_documents and found.num_tokens == meta.train.num_tokens
    assert found.lengths.maximum <= meta.longest_document_tokens
    assert 0 < found.num_duplicates <= 10 and f"{tmp_path}/bins train document " in found.duplicates[0]
    assert analyzed(tmp_path / "bins", tmp_path, sample=30).num_samples == 30


def test_nanogpts_bins_are_read_by_their_end_tokens(tmp_path):
    tokens = np.array([1, 2, 50256, 3, 50256, 4, 5, 6], dtype="<u2")
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
    found = analyzed(tmp_path, tmp_path)
    assert found.lengths_found.tolist() == [2, 3] and found.length_counts.tolist() == [1, 2]


def test_data_that_validate_are_left_out(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", documents(30))
    write_jsonl(folder / "val.jsonl", documents(5))
    assert analyzed(folder, tmp_path).num_samples == 30


# --- samples


def test_a_sample_says_so_and_estimates_the_rest(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(1000))
    found = analyzed(path, tmp_path, sample=100)
    assert found.num_samples == 100 and not found.is_complete
    lines = path.read_bytes().splitlines(keepends=True)
    assert found.num_samples_in_all == round(99 * path.stat().st_size / sum(map(len, lines[:99])))
    assert found.epochs(10, 20) == 200 / found.num_samples_in_all
    assert analyzed(path, tmp_path, sample=1000).is_complete
    assert not analyzed(path, tmp_path, sample=999).is_complete


def test_a_table_read_in_part_does_not_guess(tmp_path):
    rows = pa.table({"text": documents(400)})
    parquet.write_table(rows, tmp_path / "one.parquet")
    parquet.write_table(rows, tmp_path / "many.parquet", row_group_size=50)
    one = analyzed(tmp_path / "one.parquet", tmp_path, sample=120)
    assert one.num_samples_in_all is None and one.epochs(1, 1) is None
    use = use_of(
        one, packing="concat", long_documents="split", context_tokens=64, samples_per_step=2, num_steps=9, epochs=None
    )
    assert use.epochs is None and use.num_tokens_seen == 64 * 2 * 9
    assert warnings(one, use, is_fine_tuning=True) == warnings(one, None, is_fine_tuning=True) == []
    assert analyzed(tmp_path / "many.parquet", tmp_path, sample=120).num_samples_in_all == 400


def test_a_bucket_is_sampled_by_itself(tmp_path, s3_server, monkeypatch):
    monkeypatch.setattr(analysis, "REMOTE_SAMPLE", 50)
    content = write_jsonl(tmp_path / "a.jsonl", documents(200)).read_bytes()
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    client.put_object(Bucket=BUCKET, Key="analysis/a.jsonl", Body=content)
    found = analyzed(f"s3://{BUCKET}/analysis/a.jsonl", tmp_path)
    assert found.num_samples == 50 and not found.is_complete
    assert analyzed(f"s3://{BUCKET}/analysis/a.jsonl", tmp_path, sample=500).is_complete


def test_progress_comes_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "_DOCUMENTS_PER_REPORT", 10)
    path = write_jsonl(tmp_path / "a.jsonl", documents(100))
    told = []
    data = DataConfig(dataset=str(path), cache_dir=str(tmp_path / "cache"))
    analyze_dataset(data, sample=None, num_processes=1, progress=told.append)
    assert [one.num_documents for one in told] == list(range(10, 101, 10))
    assert told[-1].read_bytes == told[-1].total_bytes == path.stat().st_size


# --- what a plan makes of it


@pytest.mark.parametrize(
    ("packing", "long_documents"), [("concat", "split"), ("best_fit", "split"), ("best_fit", "drop"), ("none", "split")]
)
def test_sequences_are_as_many_as_training_makes(tmp_path, packing, long_documents):
    path = write_jsonl(tmp_path / "a.jsonl", [*documents(200), " ".join(documents(30))])
    prepared(path, tmp_path / "bins")
    data = DataConfig(dataset=str(tmp_path / "bins"), packing=packing, long_documents=long_documents)
    (source,) = training_sources(open_dataset(data), data, context_tokens=50)
    found = analyzed(tmp_path / "bins", tmp_path)
    fit = fit_of(found, context_tokens=50, packing=packing, long_documents=long_documents)
    assert fit.num_sequences == source.rows.num_samples
    assert fit.num_long == found.length_counts[found.lengths_found > 51].sum() > 0
    assert (fit.lost_tokens_share > 0) == (long_documents == "drop")


def test_many_documents_are_packed_by_a_sample(monkeypatch):
    chance = random.Random(2)
    found = made([chance.randint(2, 150) for _ in range(20000)])
    exact = fit_of(found, context_tokens=100, packing="best_fit", long_documents="truncate")
    monkeypatch.setattr(advice, "_MOST_PACKED", 4000)
    sampled = fit_of(found, context_tokens=100, packing="best_fit", long_documents="truncate")
    assert sampled.num_sequences == pytest.approx(exact.num_sequences, rel=0.01)
    assert sampled.lost_tokens_share == pytest.approx(exact.lost_tokens_share, rel=0.02)
    assert sampled.padding_share == pytest.approx(exact.padding_share, abs=0.01)


def test_concat_cuts_a_document_where_a_sequence_ends():
    found = made([101] * 500)
    assert fit_of(found, context_tokens=1000, packing="concat", long_documents="split").cut_documents_share == 0.1
    assert fit_of(found, context_tokens=50, packing="concat", long_documents="split").cut_documents_share == 1.0


def test_2198_conversations_for_200_steps_of_64_warn():
    found = made([3000] * 2198, kind="chat")
    assert found.epochs(200, 64) == pytest.approx(5.823, abs=0.001)
    use = use_of(
        found,
        packing="best_fit",
        long_documents="truncate",
        context_tokens=3072,
        samples_per_step=64,
        num_steps=200,
        epochs=None,
    )
    assert use.epochs == use.unpacked_epochs == found.epochs(200, 64), "one conversation fills a sequence"
    told = {one.code: one for one in warnings(found, use, is_fine_tuning=True)}
    assert set(told) == {"small_set", "epochs"}
    assert (
        "5.8 epochs over 2,198 samples" in told["epochs"].text
        and "beyond 5, which are 171 steps" in told["epochs"].text
    )
    assert "2203.02155" in told["epochs"].source


def test_packing_makes_more_epochs_of_the_same_steps():
    found = made([500] * 2198, kind="chat")
    use = use_of(
        found,
        packing="best_fit",
        long_documents="truncate",
        context_tokens=3072,
        samples_per_step=64,
        num_steps=100,
        epochs=None,
    )
    assert use.unpacked_epochs == pytest.approx(2.91, abs=0.01) and use.epochs == pytest.approx(6 * 2.91, rel=0.01)
    (told,) = [one for one in warnings(found, use, is_fine_tuning=True) if one.code == "epochs"]
    assert "(2.9 where a sequence holds one sample)" in told.text


@pytest.mark.parametrize(("num_samples", "most"), [(4999, 5), (5000, 3), (15000, 3), (15001, 2)])
def test_larger_fine_tuning_sets_take_fewer_epochs(num_samples, most):
    assert most_fine_tuning_epochs(num_samples) == most


def test_pretraining_repeats_up_to_four_times():
    found = made([65] * 100)
    plan = {
        "packing": "concat",
        "long_documents": "split",
        "context_tokens": 64,
        "samples_per_step": 101,
        "num_steps": None,
    }
    four, five = (use_of(found, epochs=epochs, **plan) for epochs in (4, 5))
    assert warnings(found, four, is_fine_tuning=False) == []
    (told,) = warnings(found, five, is_fine_tuning=False)
    assert (
        told.code == "repetition" and "5.0 epochs" in told.text and "4.5" in told.text and "2305.16264" in told.source
    )


@pytest.mark.parametrize(
    ("epochs", "worth"), [(0.5, 0.5), (1, 1), (2, 1.97), (4, 3.73), (8, 6.62), (16, 10.58), (40, 15.17)]
)
def test_the_worth_of_repeated_data_is_the_papers(epochs, worth):
    assert worth_in_epochs(epochs) == pytest.approx(worth, abs=0.005)


def test_a_plan_ends_with_steps_or_epochs_whichever_is_first():
    found = made([65] * 640)  # 650 sequences of 64
    common = {"packing": "concat", "long_documents": "split", "context_tokens": 64, "samples_per_step": 10}
    assert use_of(found, num_steps=None, epochs=None, **common).num_steps == 64
    assert use_of(found, num_steps=1000, epochs=2, **common).num_steps == 129
    use = use_of(found, num_steps=100, epochs=2, **common)
    assert use.num_steps == 100 and use.num_tokens_seen == 64000
    assert use.steps_per_epoch == 64.9 and use.epochs == pytest.approx(100 / 64.9)


def test_documents_that_lose_tokens_warn():
    found = made([50] * 98 + [500] * 2)
    plan = {"packing": "best_fit", "context_tokens": 100, "samples_per_step": 10, "num_steps": 2, "epochs": None}
    (told,) = warnings(found, use_of(found, long_documents="truncate", **plan), is_fine_tuning=False)
    lost = 2 * (500 - 101) / (50 * 98 + 1000)
    assert told.code == "long_documents" and "2.0% of the documents" in told.text and f"{lost:.1%}" in told.text
    assert warnings(found, use_of(found, long_documents="split", **plan), is_fine_tuning=False) == []


def test_duplicates_warn_from_one_in_a_hundred():
    few, many = (made([50] * 1000, digest=lambda number, least=least: max(number, least)) for least in (9, 10))
    assert (few.num_duplicates, many.num_duplicates) == (9, 10)
    assert codes(warnings(few, None, is_fine_tuning=False)) == []
    (told,) = warnings(many, None, is_fine_tuning=False)
    assert told.code == "duplicates" and "1.0%" in told.text and "2107.06499" in told.source


def test_mixtures_share_the_steps():
    large, small = made([65] * 900), made([65] * 100)
    fits = [fit_of(one, context_tokens=64, packing="concat", long_documents="split") for one in (large, small)]
    plan = Plan(context_tokens=64, samples_per_step=20, num_steps=500, epochs=None)
    by_size = uses_of([large, small], fits, [None, None], plan)
    assert by_size[0].epochs == pytest.approx(by_size[1].epochs)
    (told,) = mixture_warnings([large, small], by_size)
    assert told.code == "dominating" and "90% of all sequences are of made" in told.text
    by_weight = uses_of([large, small], fits, [Fraction(1, 2), Fraction(1, 2)], plan)
    assert by_weight[1].epochs == pytest.approx(by_weight[0].epochs * fits[0].num_sequences / fits[1].num_sequences)
    assert mixture_warnings([large, small], by_weight) == []
    assert codes(warnings(small, by_weight[1], is_fine_tuning=False)) == ["repetition"]


def test_each_data_set_of_a_mixture_is_analyzed(tmp_path):
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", documents(count)) for name, count in (("a", 20), ("b", 30)))
    data = DataConfig(dataset=f"{one}:0.7,{two}:0.3", cache_dir=str(tmp_path / "cache"))
    found = analyze_dataset(data, sample=None, num_processes=1)
    assert [(each.num_samples, float(weight)) for each, weight in found] == [(20, 0.7), (30, 0.3)]


def test_json_holds_plain_values():
    text = json.dumps(made([3, 4, 400]).to_json())
    assert json.loads(text)["lengths"]["maximum"] == 400 and not math.isnan(json.loads(text)["lengths"]["mean"])
