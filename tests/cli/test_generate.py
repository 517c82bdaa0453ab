"""`generate` and `chat`: whose weights answer, how they are held, from where they come, and what is refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cli.test_cli_checkpoint import MODEL_FACTS, weights
from tests.conftest import BUCKET
from tests.data.chat_shapes import CHATML, QWEN_TOOLS, save_tokenizer
from tests.hf_folders import VOCAB, write_hf_folder
from tests.jobs import config_of
from tests.rank_pool import RankPool
from tests.s3_server import Server
from tests.train.test_lora import change_one_weight, some_steps

from hypershard.adapters.nf4_weights import nf4_weights
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place, find_place
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.cli.generate import Opened
from hypershard.cli.loaded_model import load_model
from hypershard.cli.main import main
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.data.encode.tokenizer import load_tokenizer
from hypershard.distributed.env import Surroundings
from hypershard.distributed.process_group import World
from hypershard.errors import DataError
from hypershard.metrics.on_track import Forecast
from hypershard.train.prompts import Prompts
from hypershard.train.restore import Start, restore
from hypershard.train.setup import build_job
from hypershard.train.texts import go_on

NEW = 12
PROMPTS = ((5, 70, 900), (31, 62, 93, 124, 155), (4000, 17), (256, 255, 254, 253))


def written_in_training(world: World, flags: str, cache_dir: Path, folder: Path) -> dict[int, tuple[int, ...]]:
    """What the training module itself writes at its newest checkpoint, as at a validation."""
    job = build_job(
        config_of(flags, cache_dir=cache_dir),
        world,
        checkpoint_dir=folder,
        surroundings=Surroundings(),
        alarm=print,
        foresee=lambda model, last_step: Forecast(),
    )
    restore(job, Start(resume=True, required=True))
    found = go_on(job, Prompts(ids=PROMPTS, ends=(), num_ids=VOCAB, max_new_tokens=NEW))
    job.data.loader.close()
    return found


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama4"])
def test_what_was_trained_beside_nf4_writes_what_it_wrote_in_training(
    pools: Callable[[int], RankPool],
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
) -> None:
    """With four bits a weight, of experts too. Weights are wide, so that rounding them changes what is written."""
    base, run = tmp_path / "hf", tmp_path / "run"
    shape = f"--model {model} --num_layers 2 --max_context_width 64 --initializer_range 0.3"
    write_hf_folder(base, shape, cache_dir=cache_dir)
    flags = f"{shape} --bf16 0 --lr 0.01 --warmup 0 --max_steps 3 --train_batch_size 2 --init_from {base} --lora_r 8"
    flags += " --bnb_quant_type nf4 --checkpoint_freq none --in_memory_checkpointing_freq 0"
    pools(1).run(some_steps, flags, cache_dir, run)
    expected = pools(1).run(written_in_training, flags, cache_dir, run)[0]

    stored = find_place(str(run)).finished()[0]
    hf_model = load_model(stored, base=None, adapters=(), context_tokens=64)
    held = nf4_weights(hf_model)
    assert held.keys() == {one for one in held if ".layers." in one} and len(held) >= 12
    opened = Opened(model=hf_model, tokenizer=load_tokenizer(TOKENIZER_PATH), texts=None, eos_token_id=None)
    asked = argparse.Namespace(seed=0, temperature=0.0, max_new_tokens=NEW)
    found = {number: tuple(opened.continued(ids, asked)) for number, ids in enumerate(PROMPTS)}
    assert found == expected and len(set(found.values())) == len(PROMPTS)

    if model == "tiny_llama":
        change_one_weight(base)
        assert main(["generate", str(run), "--tokenizer", str(TOKENIZER_PATH)]) == 2
        assert "is not the model that the adapters" in capsys.readouterr().err


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 10 and 20 of other random weights each; of both validations that after step 10 was the lower."""
    run = tmp_path / "run"
    tier = DurableTier(Place(DiskStore(run / "checkpoints")))
    for step, facts in ((10, {}), (20, {"best": {"loss": 0.25, "step": 10, "num_since": 1}})):
        torch.manual_seed(step)
        tensors = {name: torch.randn(tensor.shape) for name, tensor in weights(0.0).items()}
        tier.save(step, take_snapshot(tensors), MODEL_FACTS | facts, Lineage(1, "first"))
    save_tokenizer(run / "tokenizer", QWEN_TOOLS)
    return run


def test_the_best_step_by_name(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(list(words)) == code
        out, err = capsys.readouterr()
        return err if code else out

    generate = ("generate", str(run_dir), "--temperature=0", "--max_new_tokens=8", "--step")
    best = said(*generate, "best")
    assert best == said(*generate, "10") != said(*generate, "newest")
    export = ("checkpoint", "export", str(run_dir), "--num_workers=1", "--step=best", f"--output={tmp_path / 'out'}")
    assert "step 10 of" in said(*export)
    assert said("checkpoint", "diff", f"{run_dir}@best", f"{run_dir}@10") == said(
        "checkpoint", "diff", f"{run_dir}@10", f"{run_dir}@10"
    )
    step = {"loss": 1.0, "tokens": 9, "step_seconds": 0.5, "tokens_per_second": 9.0, "mfu": None, "memory_bytes": 9,
            "data_seconds": 0.0, "padding": 0.0}  # fmt: skip
    records = [{**step, "step": 20}, *({"step": one, "validation_loss": one / 40} for one in (10, 20))]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "best       0.2500 at step 10, kept\n" in said("report", str(run_dir))

    assert main(["checkpoint", "prune", str(run_dir), "--keep", "1"]) == 0
    assert "was that of step 10, which" in said(*generate, "best", code=2)
    assert "best       0.2500 at step 10, not kept\n" in said("report", str(run_dir))
    (run_dir / "checkpoints" / "step-00000020").rename(tmp_path / "step-00000020")
    assert "best       0.2500 at step 10, not kept\n" in said("report", str(run_dir))
    assert "found no checkpoint" in said(*generate, "best", code=2)


def test_more_than_the_device_holds_is_refused_before_anything_is_read(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run_dir), "--max_new_tokens", str(10**10)]) == 2
    message = capsys.readouterr().err
    assert "GiB free on the CPU, expected" in message and "checkpoint export" in message
    # 2 heads of 8 in one layer, keys and values of 4 bytes: 128 bytes a token
    assert f"of {10**10 + 3} tokens 1192.1" in message


def test_a_run_in_a_bucket_talks_as_one_on_a_disk(
    run_dir: Path, tmp_path: Path, s3_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"s3://{BUCKET}/talk/run"
    for step in ("10", "20"):
        assert main(["checkpoint", "copy", str(run_dir), place, "--step", step]) == 0
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "weigh"}}]')
    chat = ["--prompt=How?", "--max_new_tokens=8", "--step=best", f"--tools={tools}"]
    for verb, flags in (("generate", ["--max_new_tokens=8"]), ("chat", chat)):
        said = []
        for one in (place, str(run_dir)):
            capsys.readouterr()
            assert main([verb, one, "--temperature=0", *flags]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and len(said[0]) > 8
    for content, template, reason in (
        ('{"name": "weigh"}', QWEN_TOOLS, "found dict under"),
        ('[{"name": "weigh"}]', CHATML, "writes nothing of them"),
    ):
        tools.write_text(content)
        (tmp_path / "template.jinja").write_text(template)
        assert main(["chat", place, *chat, f"--chat_template={tmp_path / 'template.jinja'}"]) == DataError.exit_code
        error = capsys.readouterr().err
        assert f"--tools={tools}" in error and reason in error
