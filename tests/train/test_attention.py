"""Which way attention goes, and a job that takes it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.jobs import config_of, tiny, train_losses
from tests.rank_pool import RankPool

from hypershard.config.checks import check
from hypershard.config.schema import Config
from hypershard.errors import ConfigError
from hypershard.train.attention import choose_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAMILIES = ("tiny_llama", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4")


def path_of(tmp_path: Path, device: torch.device, **settings: object) -> str:
    config = config_of(tiny(**settings), cache_dir=tmp_path)
    return choose_attention(config, config.model, device).path


@pytest.mark.parametrize(
    ("device", "settings", "path"),
    [
        (GPU, {"bf16": 1}, "varlen"),
        (GPU, {"bf16": 1, "attention": "dense"}, "dense"),
        (GPU, {"bf16": 1, "document_mask": 0}, "dense"),
        (GPU, {"bf16": 1, "document_mask": 0, "attention": "varlen"}, "varlen"),
        (GPU, {"bf16": 0}, "dense"),
        (GPU, {"bf16": 1, "head_width": 20}, "dense"),
        (GPU, {"bf16": 1, "head_width": 200}, "dense"),
        (GPU, {"bf16": 1, "head_width": 192}, "varlen"),
        (GPU, {"bf16": 1, "attn_pdrop": 0.1}, "dense"),
        (CPU, {}, "dense"),
        (CPU, {"bf16": 1}, "dense"),
        (CPU, {"attention": "varlen"}, "varlen"),
        (CPU, {"attention": "varlen", "head_width": 20}, "varlen"),
    ],
    ids=str,
)
def test_the_way_taken(tmp_path: Path, device: torch.device, settings: dict, path: str) -> None:
    assert path_of(tmp_path, device, **settings) == path


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"bf16": 0}, "--bf16=0"), ({"bf16": 1, "head_width": 20}, "--head_width=20")],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_refused_by_name(tmp_path: Path, settings: dict, found: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention=varlen.*{found}.*--attention=dense"):
        path_of(tmp_path, GPU, attention="varlen", **settings)


def test_dropout_on_attention_weights_is_refused_before_a_device_is_known() -> None:
    config = Config()
    model = dataclasses.replace(config.model, model_type="gpt2", attn_pdrop=0.1)
    parallel = dataclasses.replace(config.parallel, attention="varlen")
    with pytest.raises(ConfigError, match=r"--attention=varlen.*--attn_pdrop=0.1"):
        check(dataclasses.replace(config, model=model, parallel=parallel))
    check(dataclasses.replace(config, model=model))


@pytest.mark.parametrize("model", FAMILIES)
def test_trains_as_with_a_mask_on_two_ranks(pools: Callable[[int], RankPool], cache_dir: Path, model: str) -> None:
    """float32, other orders of sums: 2e-6 at step 1, then AdamW turns rounding into updates (see test_numerics)."""
    flags = f"--model {model} --num_layers 2 --max_context_width 64 --bf16 0 --max_steps 9 --lr 0.001 --warmup 0"
    dense, varlen = (
        pools(2).run(train_losses, f"{flags} --train_batch_size 2 --attention {path}", cache_dir, 3)[0]
        for path in ("dense", "varlen")
    )
    assert varlen[0] == pytest.approx(dense[0], rel=2e-6)
    assert [loss for loss, _ in varlen] == pytest.approx([loss for loss, _ in dense], rel=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"offload_activations": 1},
        {"activation_checkpointing": "selective", "offload_activations": 1, "cpu_offload": 1},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_what_trades_memory_changes_no_bit(pools: Callable[[int], RankPool], cache_dir: Path, settings: dict) -> None:
    base = {"attention": "varlen", "train_batch_size": 1, "gradient_accumulation_steps": 2}
    plain = pools(2).run(train_losses, tiny(**base), cache_dir, 2)[0]
    assert pools(2).run(train_losses, tiny(**base, **settings), cache_dir, 2)[0] == plain
