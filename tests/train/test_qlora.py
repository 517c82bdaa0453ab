"""Adapters beside weights in NF4: what is computed, held, planned and refused, however the weights are spread."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf_folders import VOCAB, write_hf_folder
from tests.jobs import a_job, config_of, tiny, train_losses
from tests.rank_pool import RankPool
from tests.train.test_lora import change_one_weight, frozen_facts, lora, refusal, resumed, some_steps, write_eight_texts
from tests.train.test_numerics import assert_same_training

from hypershard.adapters.nf4 import dequantise, quantise
from hypershard.adapters.nf4_format import Format
from hypershard.adapters.nf4_weights import nf4_weights
from hypershard.adapters.targets import nf4_formats
from hypershard.cli.main import main
from hypershard.distributed.process_group import World
from hypershard.errors import ConfigError

SHAPE = "--num_layers 2 --max_context_width 64 --bf16 0 --lr 0.01 --warmup 0 --lr_decay_style constant --max_steps 5"
NF4 = "--lora_r 8 --bnb_quant_type nf4"


def qlora(**overrides: Any) -> str:
    return lora(bnb_quant_type="nf4", **overrides)


def write_dequantised(source: Path, target: Path, formats: dict[str, Format]) -> None:
    """The model folder `source` with the values that NF4 gives its matrices."""
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    parameters = dict(hf_model.named_parameters())
    for name, layout in formats.items():
        value = parameters[name].data
        parts = quantise(value, double_quant=layout.double_quant)
        value.copy_(dequantise(parts, layout, dtype=torch.float32).view(value.shape))
    hf_model.save_pretrained(target)


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_mixtral --num_experts 3", "tiny_llama4 --num_experts 16 --hidden_width 64"]
)
def test_trains_as_beside_the_dense_model_with_the_same_values_on_one_rank_and_two(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str
) -> None:
    """Bit for bit on one rank. Two ranks hold half of the second of three experts each, and read it so."""
    shape = f"--model {model} {SHAPE}"
    write_hf_folder(tmp_path / "hf", shape, cache_dir=cache_dir)
    config = config_of(f"{shape} --vocab_size {VOCAB} {NF4}", cache_dir=cache_dir)
    write_dequantised(tmp_path / "hf", tmp_path / "dequantised", nf4_formats(config.model, config.adapters))
    whole, halves = "--train_batch_size 2", "--train_batch_size 1"
    flags = f"{shape} {NF4} --init_from {tmp_path / 'hf'}"
    dense = f"{shape} --lora_r 8 --init_from {tmp_path / 'dequantised'} {whole}"
    found = pools(1).run(train_losses, f"{flags} {whole}", cache_dir, 3)[0]
    assert found == pools(1).run(train_losses, dense, cache_dir, 3)[0]
    for settings in ("", "--activation_checkpointing selective --cpu_offload 1"):
        assert_same_training(pools(2).run(train_losses, f"{flags} {halves} {settings}", cache_dir, 3)[0], found)


def base_and_codes(world: World, flags: str, cache_dir: Path) -> tuple[tuple[int, ...], dict[str, list[torch.Tensor]]]:
    with a_job(world, flags, cache_dir) as job:
        assert job.base is not None
        held = nf4_weights(job.module.hf_model)
        codes = {name: [part.full_tensor().view(torch.int16) for part in one.parts()] for name, one in held.items()}
        return job.base.bit_sums, codes


def test_weights_from_the_seed_have_the_same_bits_in_any_layout_and_precision(
    pools: Callable[[int], RankPool], cache_dir: Path
) -> None:
    flags = f"--model tiny_mixtral --num_experts 3 {SHAPE} {NF4} --train_batch_size 1"
    sums, codes = pools(1).run(base_and_codes, flags, cache_dir)[0]
    for settings in ("--bf16 1", "--sharding_strategy none"):
        for other_sums, other_codes in pools(2).run(base_and_codes, f"{flags} {settings}", cache_dir):
            assert other_sums == sums
            for name, parts in codes.items():
                assert all(torch.equal(*pair) for pair in zip(parts, other_codes[name], strict=True)), name
    assert pools(1).run(base_and_codes, f"{flags} --bnb_double_quant 0", cache_dir)[0][0] != sums


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral"])
def test_matrices_take_half_a_byte_and_only_adapters_change(
    pools: Callable[[int], RankPool], cache_dir: Path, model: str
) -> None:
    """Of experts too."""
    flags = f"{qlora(bf16=1, train_batch_size=1)} --model {model} --hidden_width 256 --intermediate_size 512"
    config = config_of(f"{flags} --vocab_size {VOCAB}", cache_dir=cache_dir)
    formats = nf4_formats(config.model, config.adapters)
    weights = sum(math.prod(layout.shape) for layout in formats.values())
    packed = sum(layout.num_bytes for layout in formats.values())
    assert 0.51 < packed / weights < 0.56  # short rows: the 8 bytes of a group are shared by 256 weights or 512
    assert any(len(layout.shape) == 3 for layout in formats.values()) is (model == "tiny_mixtral")
    for found in pools(2).run(frozen_facts, flags, cache_dir):
        assert found["unchanged"] and not found["gradients"]
        others = found["numbers"] - packed // 2  # parameters of bfloat16 that hold bytes
        assert found["bytes"] * 2 == 2 * others + packed
        adapters = {name for name in found["names"] if "lora_" in name}
        assert found["names"] == adapters and len(adapters) == 3 * len(found["moments"])


def test_adapters_learn_eight_texts_by_heart(pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path) -> None:
    flags = write_eight_texts(tmp_path / "eight.txt") + " --bnb_quant_type nf4"
    found = pools(1).run(train_losses, flags, cache_dir, 120)[0]
    assert found[0][0] > 5 and found[-1][0] < 0.02


def test_a_resumed_run_goes_on_exactly_and_only_with_the_same_quantisation(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what it trained merges into the model's own weights."""
    base, run = tmp_path / "hf", tmp_path / "run"
    shape = f"--model tiny_llama {SHAPE}"
    write_hf_folder(base, shape, cache_dir=cache_dir)
    flags = f"{shape} {NF4} --train_batch_size 2 --init_from {base}"
    whole = pools(1).run(some_steps, flags, cache_dir, tmp_path / "whole")[0][1]
    assert pools(1).run(some_steps, f"{flags} --max_steps 3", cache_dir, run)[0][1] == whole[:3]

    for other, was in (
        ("--bnb_quant_type none", "--bnb_quant_type=nf4 (this run: none)"),
        ("--bnb_double_quant 0", "--bnb_double_quant=True (this run: False)"),
    ):
        assert was in pools(1).run(refusal, f"{flags} {other}", cache_dir, run)[0]
    assert pools(1).run(resumed, flags, cache_dir, run)[0][1] == whole[3:]

    export = ["checkpoint", "export", str(run), "--dtype", "float32", "--num_workers", "1", "--output"]
    assert main([*export, str(tmp_path / "merged")]) == 0
    assert main([*export, str(tmp_path / "adapter"), "--adapter"]) == 0
    assert "are not quantised" in caplog.text
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(48).reshape(2, 24) * 31 % VOCAB
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        before = plain.eval()(ids, use_cache=False).logits
        alone = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(ids, use_cache=False).logits
        found = merged.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    change_one_weight(base)
    assert main([*export, str(tmp_path / "wrong")]) == 2
    assert "beside other weights" in pools(1).run(refusal, f"{flags} --max_steps 6", cache_dir, run)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bnb_quant_type nf4", "acts only with adapters"),
        ("--lora_r 8 --bnb_double_quant 0", "acts only on weights in nf4"),
        ("--lora_r 8 --bnb_quant_type fp4", "nf4"),
    ],
)
def test_settings_that_mean_nothing_are_refused(cache_dir: Path, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(f"{tiny()} {flags}", cache_dir=cache_dir)
