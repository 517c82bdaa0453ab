"""Starting from a Hugging Face folder: the first loss is the one transformers computes with those weights."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.hf_folders import write_hf_folder, write_scout_folder
from tests.jobs import a_job
from tests.rank_pool import RankPool

from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.cli.main import main
from hypershard.distributed.process_group import World
from hypershard.errors import ConfigError
from hypershard.train.state import Progress
from hypershard.train.step import train_step

FAMILIES = ("tiny_llama", "tiny_llama2", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4")


def first_loss_and_batches(world: World, flags: str, cache_dir: Path) -> tuple[float, list[torch.Tensor]]:
    with a_job(world, flags, cache_dir) as job:
        (batch,) = job.data.loader.step(0, accumulation=1)
        loss = train_step(job, Progress(), flags=tuple).loss
        return loss, [batch.input_ids, batch.labels, batch.position_ids]


def error_of_start(world: World, flags: str, cache_dir: Path) -> str:
    try:
        with a_job(world, flags, cache_dir):
            return ""
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("model", "other", "named"),
    [
        ("tiny_llama", "--rotary_emb_base 10001", "rope_theta"),
        ("tiny_llama", "--norm_epsilon 1e-6", "rms_norm_eps"),
        ("tiny_llama", "--num_heads 8 --num_key_value_heads 4", "num_attention_heads"),
        ("tiny_gpt2", "--num_heads 2", "n_head"),
        ("tiny_mixtral", "--experts_per_token 1", "num_experts_per_tok"),
        ("tiny_mistral", "--sliding_window 16", "sliding_window"),
    ],
)
def test_equal_shapes_of_another_model_are_refused(  # noqa: PLR0917 - pytest passes by name
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str, other: str, named: str
) -> None:
    flags = f"--model {model} --num_layers 2 --max_context_width 64 --bf16 0 --max_steps 5"
    write_hf_folder(tmp_path / "hf", flags, cache_dir=cache_dir)
    found = pools(1).run(error_of_start, f"{flags} {other} --init_from {tmp_path / 'hf'}", cache_dir)[0]
    assert "holds another model" in found and named in found


@pytest.mark.parametrize("model", FAMILIES)
def test_first_loss_is_that_of_transformers(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str
) -> None:
    from transformers import AutoModelForCausalLM

    flags = f"--model {model} --num_layers 2 --max_context_width 64 --train_batch_size 2 --bf16 0 --max_steps 5"
    write_hf_folder(tmp_path / "hf", flags, cache_dir=cache_dir)
    results = pools(2).run(first_loss_and_batches, f"{flags} --init_from {tmp_path / 'hf'}", cache_dir)
    input_ids, labels, position_ids = (torch.cat([result[1][part] for result in results]) for part in range(3))
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = hf_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for loss, _ in results:
        assert loss == pytest.approx(float(expected), rel=2e-6)


SCOUT = "--model tiny_llama4 --max_context_width 64 --attention_chunk_size 16 --bf16 0 --max_steps 5"


def start_and_save(world: World, flags: str, cache_dir: Path, run_dir: Path) -> tuple[str, float, torch.Tensor]:
    """What the log says of the start, the first loss and its tokens; the weights as they were read are saved."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("hypershard")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        with a_job(world, flags, cache_dir) as job:
            tier = DurableTier(Place(DiskStore(run_dir / "checkpoints")), group=world.checkpoint_group)
            tier.save(1, take_snapshot(job.tensors()), job.facts(Progress()), Lineage(1, "first"))
            (batch,) = job.data.loader.step(0, accumulation=1)
            loss = train_step(job, Progress(), flags=tuple).loss
            return "\n".join(said), loss, torch.stack([batch.input_ids, batch.labels, batch.position_ids])
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def test_the_text_model_of_a_model_with_vision_is_trained_and_exported(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path
) -> None:
    """Scout as it is published: Llama4ForConditionalGeneration, under the names that transformers saves it with."""
    from transformers import AutoModelForCausalLM, Llama4ForCausalLM

    folder, run = tmp_path / "hf", tmp_path / "run"
    wrapper = write_scout_folder(folder, SCOUT, cache_dir=cache_dir)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attn_temperature_tuning"] = 4  # as transformers 4.51 wrote a condition
    (folder / "config.json").write_text(json.dumps(config))
    flags = f"{SCOUT} --train_batch_size 2 --init_from {folder}"
    said, loss, (input_ids, labels, position_ids) = pools(1).run(start_and_save, flags, cache_dir, run)[0]
    num_left_out = sum(not name.startswith("language_model.") for name in wrapper.state_dict())
    assert f"{num_left_out} vision tensors are not used" in said
    with torch.no_grad():
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        expected = wrapper.language_model(**inputs).logits
        assert loss == pytest.approx(float(F.cross_entropy(expected.flatten(0, 1), labels.flatten())), rel=2e-6)
        export = ["checkpoint", "export", str(run), "--output", str(tmp_path / "text"), "--num_workers", "1"]
        assert main([*export, "--dtype", "float32"]) == 0
        text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
        assert type(text) is Llama4ForCausalLM and torch.equal(text(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_temperature_tuning": False}, "attn_temperature_tuning False"),
        ({"use_qk_norm": False}, "use_qk_norm False"),
        ({"moe_layers": [1, 3]}, r"moe_layers [1, 3]"),
        ({"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers [0, 1, 1, 1]"),
        ({"floor_scale": 4}, "floor_scale 4"),
        ({"attn_temperature_tuning": 0}, "attn_temperature_tuning False"),  # transformers 4.51 wrote numbers there
    ],
)
def test_a_text_config_that_is_not_built_is_refused(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, change: dict, named: str
) -> None:
    write_scout_folder(tmp_path, SCOUT, cache_dir=cache_dir)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = pools(1).run(error_of_start, f"{SCOUT} --init_from {tmp_path}", cache_dir)[0]
    assert named in found and ("No setting changes that" in found or "cannot be used" in found)
