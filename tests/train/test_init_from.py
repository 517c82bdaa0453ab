"""Starting from a Hugging Face folder: the first loss is the one transformers computes with those weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.hf_folders import write_hf_folder
from tests.jobs import a_job
from tests.rank_pool import RankPool

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
