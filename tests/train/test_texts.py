"""Texts at validations: what a plain model would write, however weights are spread, and training is none the wiser."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.chat_shapes import CHATML, save_tokenizer
from tests.integration.processes import train_well
from tests.jobs import a_job, config_of, tiny
from tests.rank_pool import RankPool

from hypershard.config.checks import check
from hypershard.config.schema import Config
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.data.open import open_dataset
from hypershard.distributed.process_group import World
from hypershard.errors import ConfigError, DataError, UserError
from hypershard.metrics.sinks import read_json_lines
from hypershard.models.family import family_of
from hypershard.parallel.init import materialise
from hypershard.report.read import read_run
from hypershard.train.evaluate import evaluate
from hypershard.train.prompts import Prompts, choose_prompts, held_out_prompts
from hypershard.train.run_dir import sinks_opener, text_keeper
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step
from hypershard.train.texts import WrittenText, go_on, write_texts

NEW = 12
SMALL = (
    f"--num_layers 2 --max_context_width 48 --bf16 0 --max_steps 9 --lr 0.003 --warmup 0 --validation_text_tokens {NEW}"
)


# --- what is written


def written_by_both(world: World, flags: str, cache_dir: Path) -> list[Any]:
    """Our ids after each prompt, and those of transformers' generate with the same weights.

    Random ones: what has been trained for a moment writes one token for ever.
    """
    with a_job(world, flags, cache_dir) as job:
        assert job.prompts is not None
        ours = go_on(job, job.prompts)
        # One that was written makes the rows end that come upon it.
        end = ours[0][1]
        ended = go_on(job, dataclasses.replace(job.prompts, ends=(end,)))
        plain = family_of(job.model.model_type).build(job.model)
        materialise(plain, parameter_device=torch.device("cpu"), buffer_device=torch.device("cpu"))
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(job.parameters[name].full_tensor())
        plain.eval()
        theirs = {}
        for number, ids in enumerate(job.prompts.ids):
            prompt = torch.tensor([ids])
            output = plain.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
            theirs[number] = tuple(output[0, len(ids) :].tolist())
        return [ours, ended, end, theirs, job.module.training]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral", "tiny_gpt2"])
def test_is_what_a_plain_model_writes_greedily(pools: Callable[[int], RankPool], cache_dir: Path, model: str) -> None:
    flags = f"--model {model} {SMALL} --train_batch_size 2 --validation_texts 5"
    ours, ended, end, theirs, is_training = pools(1).run(written_by_both, flags, cache_dir)[0]
    assert ours == theirs and {len(ids) for ids in ours.values()} == {NEW}
    assert len(set(ours.values())) == 5 and is_training
    for number, ids in ours.items():
        assert ended[number] == (ids[: ids.index(end) + 1] if end in ids else ids)


def texts_of(world: World, flags: str, cache_dir: Path) -> list[WrittenText]:
    with a_job(world, flags, cache_dir) as job:
        return write_texts(job)


@pytest.mark.parametrize("attention", ["dense", "varlen"])
def test_two_ranks_write_what_one_does(pools: Callable[[int], RankPool], cache_dir: Path, attention: str) -> None:
    """Five prompts on two ranks with two rows each: two rounds, and in the second a row and a rank without a prompt."""
    flags = f"--model tiny_llama {SMALL} --validation_texts 5 --attention {attention}"
    one = pools(1).run(texts_of, f"{flags} --train_batch_size 8", cache_dir)[0]
    two = pools(2).run(texts_of, f"{flags} --train_batch_size 2", cache_dir)
    assert two == [one, []]
    assert len({text.prompt for text in one}) == 5 and all(text.num_tokens == NEW for text in one)


def test_nothing_is_written_beyond_the_context(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    """Prompts of 32 tokens in a context of 36 leave four."""
    flags = f"--model tiny_llama {SMALL} --max_context_width 36 --validation_texts 2 --train_batch_size 2"
    assert {text.num_tokens for text in pools(1).run(texts_of, flags, cache_dir)[0]} == {4}


# --- what it leaves


def trained(world: World, flags: str, cache_dir: Path) -> tuple[list[float], list[float], str]:
    """Losses, validation losses, and a checksum of this rank's weights and moments."""
    with a_job(world, flags, cache_dir) as job:
        progress, losses, validations = Progress(), [], []
        for _ in range(2):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=0.0)
            losses.append(report.loss)
            validations.append(evaluate(job)["validation_loss"])
            assert bool(write_texts(job)) == (job.prompts is not None and world.ranks.is_main)
        content = b"".join(tensor.to_local().numpy().tobytes() for tensor in job.tensors().values())  # type: ignore[attr-defined]
        return losses, validations, hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_r": 4, "lora_dropout": 0.2}, {"sharding_strategy": "zero2", "gradient_accumulation_steps": 2}],
    ids=str,
)
def test_training_is_the_same_bit_for_bit(pools: Callable[[int], RankPool], cache_dir: Path, settings: dict) -> None:
    flags = tiny(**{"train_batch_size": 1, "num_layers": 2, "validation_batches": 1, **settings})
    plain = pools(2).run(trained, flags, cache_dir)
    assert pools(2).run(trained, f"{flags} --validation_texts 3 --validation_text_tokens 3", cache_dir) == plain


def text(words: str) -> WrittenText:
    return WrittenText(prompt="Once", text=words, num_tokens=1, ended=False)


def test_a_run_that_goes_on_forgets_texts_of_later_steps(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    config = config_of(f"{tiny()} --tensorboard_dir none", cache_dir=cache_dir)
    keep_texts = text_keeper(tmp_path)
    keep_texts(5, [])
    assert not (tmp_path / "texts.jsonl").exists()
    with caplog.at_level(logging.INFO, logger="hypershard"):
        for step in (5, 10):
            keep_texts(step, [text("upon\x1b[2J\n" * 50), text("more")])
    assert len(set(caplog.messages)) == 2 and max(map(len, caplog.messages)) < 220
    assert r"upon\x1b[2J\n" in caplog.messages[0] and "\x1b" not in caplog.text

    def kept(step: int, **train: Any) -> list[int]:
        settings = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
        for sink in sinks_opener(tmp_path, settings, is_main=True, more=[])(step, 20):
            sink.close()
        return [record["step"] for record in read_json_lines(tmp_path / "texts.jsonl")]

    assert kept(5, eval_only=True) == [5, 5, 10, 10]
    assert kept(5) == [5, 5]


@pytest.mark.slow
def test_a_run_keeps_them(tmp_path: Path) -> None:
    """From the flags to the file and the report."""
    flags = {"run_dir": tmp_path, "nproc_per_node": 1, "max_steps": 4, "validation_freq": 2, "validation_batches": 1}
    output = train_well(**flags, validation_texts=3, validation_text_tokens=4)
    assert "step 4: the model goes on from " in output
    records = read_json_lines(tmp_path / "texts.jsonl")
    assert [record["step"] for record in records] == [2, 2, 2, 4, 4, 4]
    assert set(records[0]) == {"step", "prompt", "text", "num_tokens", "ended"}
    assert [(one.first[0], one.newest[0]) for one in read_run(tmp_path).texts] == [(2, 4)] * 3


# --- what it goes on from


def chats(folder: Path) -> tuple[str, Path]:
    """The flags of a data set of conversations of many lengths, and its tokenizer."""
    tokenizer = save_tokenizer(folder / "tokenizer", CHATML)
    rows = [
        [
            {"role": "user", "content": f"Why {number}? " * (number % 40 + 1)},
            {"role": "assistant", "content": f"So {number}."},
        ]
        for number in range(200)
    ]
    (folder / "chats").mkdir()
    for split in ("train", "val"):
        (folder / "chats" / f"{split}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return f"--dataset {folder / 'chats'} --tokenizer {tokenizer}", tokenizer / "tokenizer.json"


def prompts_of(config: Config, *, context_tokens: int, tokenizer: Path | None = None) -> Prompts:
    dataset = open_dataset(config.data)
    found = choose_prompts(
        config,
        dataset,
        tokenizer_path=tokenizer or dataset.tokenizer_path,
        context_tokens=context_tokens,
        is_main=True,
    )
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one process is all ranks there are."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)


def test_conversations_up_to_the_answer_that_fit(tmp_path: Path, cache_dir: Path) -> None:
    flags, tokenizer = chats(tmp_path)
    config = config_of(f"{tiny()} {flags} --validation_texts 3 --validation_text_tokens 8", cache_dir=cache_dir)
    backend = load_tokenizer(tokenizer).backend
    found = prompts_of(config, context_tokens=64)
    texts = [backend.decode(list(ids), skip_special_tokens=False) for ids in found.ids]
    assert len(set(texts)) == 3 and found.max_new_tokens == 8
    for one, ids in zip(texts, found.ids, strict=True):
        assert one.startswith("<|im_start|>system\n") and one.endswith("? <|im_end|>\n<|im_start|>assistant\n")
        assert len(ids) < 64
    assert set(found.ends) == {backend.token_to_id("<|im_end|>"), backend.token_to_id("</s>")}
    (tmp_path / "prompts").write_text("What is it?\n\n  And why? \nMore\n")
    given = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, validation_texts=2, validation_prompts=str(tmp_path / "prompts")),
    )
    asked = [backend.decode(list(ids), skip_special_tokens=False) for ids in prompts_of(given, context_tokens=64).ids]
    assert [one.split("user\n")[1] for one in asked] == [
        f"{question}<|im_end|>\n<|im_start|>assistant\n" for question in ("What is it?", "And why?")
    ]


def test_pairs_of_plain_answers_up_to_the_answer(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokenizer has no chat template, so lines of a file stay what they are, and a warning says so."""
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    for split in ("train", "val"):
        rows = [{"prompt": f"Is {n} even?", "chosen": " Yes.", "rejected": " No, not at all."} for n in range(0, 40, 2)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts").write_text("Is 41 even?\n")
    flags = f"{tiny(dataset=tmp_path)} --data_kind preference --objective dpo --lora_r 4"
    for more, expected in (("", "Is 0 even?"), (f" --validation_prompts {tmp_path / 'prompts'}", "Is 41 even?")):
        config = config_of(f"{flags} --validation_texts 1{more}", cache_dir=cache_dir)
        tokenizer = open_dataset(config.data).tokenizer_path
        assert tokenizer is not None
        found = prompts_of(config, context_tokens=64)
        assert load_tokenizer(tokenizer).backend.decode(list(found.ids[0])) == expected
        assert found.ends == (load_tokenizer(tokenizer).eos_token_id,)
    assert "--validation_prompts: lines are plain text and not a user's messages" in caplog.text


def test_text_and_a_file_of_prompts(tmp_path: Path, cache_dir: Path) -> None:
    config = config_of(f"{tiny()} --validation_texts 6", cache_dir=cache_dir)
    found = prompts_of(config, context_tokens=64)
    source = open_dataset(config.data).members[0].val
    starts = source.document_starts
    assert starts is not None and found.ends == (source.eos_token_id,)
    documents = [
        next(number for number, start in enumerate(starts) if tuple(source.read(int(start), len(ids)).tolist()) == ids)
        for ids in found.ids
    ]
    assert documents == sorted(set(documents)) and documents[-1] > len(starts) // 2, "spread over the split"
    assert {len(ids) for ids in found.ids} == {32}
    assert {len(ids) for ids in prompts_of(config, context_tokens=20).ids} == {19}
    (tmp_path / "prompts").write_text("The ship\nsaid </s>")
    given = dataclasses.replace(config.train, validation_texts=2, validation_prompts=str(tmp_path / "prompts"))
    found = prompts_of(dataclasses.replace(config, train=given), context_tokens=64)
    assert source.tokenizer_path is not None
    backend = load_tokenizer(source.tokenizer_path).backend
    assert [backend.decode(list(ids)) for ids in found.ids] == ["The ship", "said </s>"]


def test_more_texts_than_documents_are_fewer_texts(
    cache_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    config = config_of(f"{tiny()} --validation_texts 9999", cache_dir=cache_dir)
    found = prompts_of(config, context_tokens=64)
    source = open_dataset(config.data).members[0].val
    assert source.document_starts is not None
    assert 0 < len(found.ids) <= len(source.document_starts)
    assert f"--validation_texts=9999: {len(found.ids)} held-out documents" in caplog.text
    with pytest.raises(DataError, match=r"--validation_texts=3: found no held-out document"):
        held_out_prompts([source], 3, context_tokens=1)


@pytest.mark.parametrize("has_ends", [True, False])
def test_bins_that_do_not_say_where_documents_begin(tmp_path: Path, cache_dir: Path, has_ends: bool) -> None:
    """nanoGPT's: after an end token, or where there is none spread evenly."""
    tokens = np.arange(1000, dtype="<u2")
    if has_ends:
        tokens[99::100] = 50256
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
    config = config_of(f"{tiny(dataset=tmp_path)} --validation_texts 2", cache_dir=cache_dir)
    found = prompts_of(config, context_tokens=64, tokenizer=open_dataset(Config().data).tokenizer_path)
    assert [ids[0] for ids in found.ids] == [0, 500]
    with pytest.raises(ConfigError, match=r"--validation_texts=2.*give the --tokenizer that made them"):
        choose_prompts(config, open_dataset(config.data), tokenizer_path=None, context_tokens=64, is_main=True)


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (None, {}, r"--validation_prompts=.*No such file"),
        ("\n \n", {}, r"found 0 lines that are not empty, expected at least 2"),
        ("one\n", {}, r"found 1 lines.*at least 2, one for each of --validation_texts"),
        ("one\n" + "word " * 90, {}, r"'word word.*expected 1 to 63.*--max_context_width=64"),
        ("", {"validation_prompts": "s3://a/b"}, r"--validation_prompts=s3://a/b: .*path on a local"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(
    tmp_path: Path, cache_dir: Path, content: str | None, settings: dict, said: str
) -> None:
    if content is not None:
        (tmp_path / "prompts").write_text(content)
    config = config_of(
        f"{tiny()} --validation_texts 2 --validation_prompts {tmp_path / 'prompts'}", cache_dir=cache_dir
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    with pytest.raises(UserError, match=said):
        prompts_of(config, context_tokens=64)


def refusal(world: World, flags: str, cache_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught, a_job(world, flags, cache_dir):
        pass
    return str(caught.value)


def test_every_rank_raises_what_rank_0_finds(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    first, second = pools(2).run(refusal, tiny(validation_texts=2, validation_prompts="/nowhere/p"), cache_dir)
    assert first == second and "--validation_prompts=/nowhere/p" in first


@pytest.mark.parametrize("setting", [{"validation_prompts": "prompts.txt"}, {"validation_text_tokens": 9}])
def test_settings_of_texts_need_some(setting: dict) -> None:
    train = dataclasses.replace(Config().train, **setting)
    with pytest.raises(ConfigError, match=rf"--{next(iter(setting))}=.* acts only on texts.*give --validation_texts"):
        check(dataclasses.replace(Config(), train=train))
    check(dataclasses.replace(Config(), train=dataclasses.replace(train, validation_texts=1)))
