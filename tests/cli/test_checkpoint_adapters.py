"""`checkpoint export` of a run with adapters: merged into whole weights, or alone in PEFT's format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.hf_folders import write_hf_folder
from tests.jobs import train_losses
from tests.rank_pool import RankPool
from tests.train.test_lora import change_one_weight, some_steps

from hypershard.cli.main import main
from hypershard.data.embedded import TOKENIZER_PATH


@torch.no_grad()
def logits(hf_model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return hf_model.eval()(input_ids=torch.arange(48).reshape(2, 24) * 31 % 4096, use_cache=False).logits


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral", "tiny_llama4"])
def test_merged_and_alone_compute_the_same(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run = tmp_path / "hf", tmp_path / "run"
    shape = f"--model {model} --num_layers 2 --max_context_width 64"
    write_hf_folder(base, shape, cache_dir=cache_dir)
    flags = f"{shape} --bf16 0 --lora_r 8 --lr 0.02 --warmup 0 --max_steps 3 --train_batch_size 2 --init_from {base}"
    pools(2).run(some_steps, flags, cache_dir, run)

    export = ["checkpoint", "export", str(run), "--output"]
    assert main([*export, str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main([*export, str(tmp_path / "merged"), "--dtype", "float32", "--num_workers", "1"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    alone = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone, before, atol=1e-3)

    # And training that goes on from either starts with the same loss.
    common = f"{shape} --bf16 0 --max_steps 3 --train_batch_size 2"
    starts = (
        f"--init_from {tmp_path / 'merged'}",
        f"--init_from {base} --lora_r 8 --lora_init_from {tmp_path / 'adapter'}",
    )
    whole, beside = (pools(2).run(train_losses, f"{common} {start}", cache_dir, 1)[0][0][0] for start in starts)
    assert whole == pytest.approx(beside, rel=2e-6)

    if model == "tiny_llama":
        assert main(["generate", str(run), "--max_new_tokens", "4", "--tokenizer", str(TOKENIZER_PATH)]) == 0
        moved = base.rename(tmp_path / "moved")
        assert (
            main(
                [
                    *export,
                    str(tmp_path / "again"),
                    "--num_workers",
                    "2",
                    "--base",
                    str(moved),
                    "--max_shard_gb",
                    "0.0005",
                ]
            )
            == 0
        )
        change_one_weight(moved)
        assert main([*export, str(tmp_path / "wrong"), "--num_workers", "1", "--base", str(moved)]) == 2
        assert not (tmp_path / "wrong").exists()
