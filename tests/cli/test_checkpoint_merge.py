"""Several adapters: merged into one model, listed, from folders and from buckets, and what is refused."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_checkpoint_adapters import logits
from tests.conftest import BUCKET
from tests.hf_folders import write_hf_folder
from tests.jobs import train_losses
from tests.rank_pool import RankPool
from tests.s3_server import Server
from tests.train.test_lora import change_one_weight, some_steps

from hypershard.checkpoint.stores import open_store
from hypershard.cli.checkpoint_merge import GivenAdapter
from hypershard.cli.main import main
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.distributed.process_group import World

SHAPE = "--num_layers 2 --max_context_width 64"


def export(place: Path | str, output: Path, *flags: str, code: int = 0) -> None:
    command = ["checkpoint", "export", str(place), "--output", str(output), "--num_workers", "1", *flags]
    assert main(command) == code


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    """What peft itself saves of an adapter whose numbers are all random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(hf_model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1)
    adapted.save_pretrained(folder)


def test_two_adapters_are_the_sum_that_peft_makes_of_them(cache_dir: Path, tmp_path: Path) -> None:
    """Of different rank, alpha and targets. bfloat16 has 8 bits, so rounding once is off by 2**-8 of a value at most;
    and it is what rounding the float64 sum gives but where float32's error, 1e-7 here, crosses a middle."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, a, b = tmp_path / "hf", tmp_path / "a", tmp_path / "b"
    write_hf_folder(base, f"--model tiny_llama {SHAPE}", cache_dir=cache_dir)
    write_adapter(base, a, 1, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    write_adapter(base, b, 2, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True)
    flags = ("--adapter", str(a), "--adapter", f"{b}:-0.5")
    export(base, tmp_path / "float32", *flags, "--dtype", "float32")
    export(base, tmp_path / "bfloat16", *flags)

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), a, "a")
    theirs.load_adapter(b, "b")
    theirs = theirs.double()
    theirs.add_weighted_adapter(["a", "b"], [1.0, -0.5], "both", combination_type="cat")
    theirs.set_adapter("both")
    expected = theirs.merge_and_unload().state_dict()
    whole, low = (load_file(tmp_path / place / "model.safetensors") for place in ("float32", "bfloat16"))
    before = load_file(base / "model.safetensors")
    num_changed = 0
    for name, value in low.items():
        exact = expected[name]
        torch.testing.assert_close(whole[name].double(), exact, rtol=1e-6, atol=1e-7)
        assert ((value.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
        assert (value == exact.to(torch.bfloat16)).float().mean() > 0.999
        num_changed += not torch.equal(whole[name], before[name])
    assert num_changed == 2 * 3  # q_proj, v_proj and down_proj of two layers
    assert "| adapter merged in | `b`, -0.5 times |" in (tmp_path / "bfloat16" / "README.md").read_text()


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_llama4"])
def test_adapters_of_experts_are_merged_as_peft_merges_them(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str
) -> None:
    """One run of all matrices, one of few, trained; and a run merged with the other's folder is the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "hf"
    write_hf_folder(base, f"--model {model} {SHAPE}", cache_dir=cache_dir)
    common = f"--model {model} {SHAPE} --bf16 0 --lr 0.02 --warmup 0 --max_steps 3 --train_batch_size 2"
    for name, settings in (
        ("all", "--lora_r 8"),
        ("some", "--lora_r 16 --lora_alpha 4 --lora_targets q_proj,experts.down_proj"),
    ):
        pools(2).run(some_steps, f"{common} {settings} --init_from {base}", cache_dir, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-adapter", "--adapter")
    flags = ("--dtype", "float32", "--adapter", f"{tmp_path / 'some-adapter'}:0.5")
    export(base, tmp_path / "ours", "--adapter", str(tmp_path / "all-adapter"), *flags)
    export(tmp_path / "all", tmp_path / "of-run", *flags)

    hf_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(hf_model)
    hf_model = PeftModel.from_pretrained(hf_model, tmp_path / "all-adapter").merge_and_unload()
    config = tmp_path / "some-adapter" / "adapter_config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "lora_alpha": 2}))  # half of 4
    theirs = logits(PeftModel.from_pretrained(hf_model, tmp_path / "some-adapter").merge_and_unload())
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)
    of_run = load_file(tmp_path / "of-run" / "model.safetensors")
    of_folder = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(of_run[name], of_folder[name]) for name in of_run)


@pytest.mark.usefixtures("own_connections")
def test_adapters_and_their_base_in_a_bucket(
    pools: Callable[[int], RankPool],
    cache_dir: Path,
    tmp_path: Path,
    s3_server: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Merged, listed and trained on from s3:// as from a disk; beside another model they are refused."""
    base, run, adapter = tmp_path / "hf", tmp_path / "run", tmp_path / "adapter"
    write_hf_folder(base, f"--model tiny_llama {SHAPE}", cache_dir=cache_dir)
    common = f"--model tiny_llama {SHAPE} --bf16 0 --lr 0.02 --warmup 0 --max_steps 3 --train_batch_size 2 --lora_r 8"
    pools(2).run(some_steps, f"{common} --init_from {base}", cache_dir, run)
    export(run, adapter, "--adapter")
    places = {base: f"s3://{BUCKET}/merge/hf", adapter: f"s3://{BUCKET}/merge/adapter"}
    for folder, place in places.items():
        for file in folder.iterdir():
            open_store(place).write("", file.name, file.read_bytes())
    export(base, tmp_path / "here", "--adapter", f"{adapter}:2")
    export(places[base], tmp_path / "there", "--adapter", f"{places[adapter]}:2")
    export(run, tmp_path / "of-run", "--base", places[base], "--adapter", places[adapter])
    here, there, of_run = (load_file(tmp_path / one / "model.safetensors") for one in ("here", "there", "of-run"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    for name in here:  # once of the run and once of its export
        torch.testing.assert_close(of_run[name], here[name], rtol=2**-7, atol=1e-6)

    talk = ["generate", str(run), "--max_new_tokens", "4", "--tokenizer", str(TOKENIZER_PATH), "--base", places[base]]
    assert main([*talk, "--adapter", places[adapter]]) == 0

    starts = [f"--init_from {base} --lora_init_from {one}" for one in (adapter, places[adapter])]
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    local, remote = (pools(2).run(losses_from, f"{common} {start}", cache_dir, keys)[0] for start in starts)
    assert local == remote

    capsys.readouterr()
    for place in (run, adapter, places[adapter]):
        assert main(["checkpoint", "list", str(place)]) == 0
        shown = capsys.readouterr().out
        assert "step 3, rank 8, alpha 16, " in shown and "o_proj, q_proj" in shown, shown
        assert f"beside {str(base)!r}: matches in names and shapes" in shown
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"]["rank"] == 8
    change_one_weight(base)
    export(base, tmp_path / "wrong", "--adapter", str(adapter), code=2)
    assert "is not the model that the adapters of" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def losses_from(world: World, flags: str, cache_dir: Path, keys: dict[str, str]) -> Any:
    os.environ.update(keys)
    return train_losses(world, flags, cache_dir, 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--adapter", "{base}"), "cannot be read as an adapter in PEFT's format"),
        (("--adapter", "{other}"), "holds other adapters"),
        (("--adapter", "{other}", "--step", "3"), "--step, --from and --base belong to a run's"),
        (("--adapter", "{other}", "--adapter"), "without a folder writes the run's adapters alone"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], named: str
) -> None:
    base, wide = tmp_path / "hf", tmp_path / "wide"
    write_hf_folder(base, f"--model tiny_llama {SHAPE}", cache_dir=cache_dir)
    write_hf_folder(wide, f"--model tiny_llama {SHAPE} --intermediate_size 96", cache_dir=cache_dir)
    write_adapter(wide, tmp_path / "other", 1, r=4, target_modules=["up_proj"])
    given = [one.format(base=base, other=tmp_path / "other") for one in flags]
    export(base, tmp_path / "out", *given, code=2)
    assert named in capsys.readouterr().err


def test_a_weight_stands_behind_the_last_colon() -> None:
    found = {text: GivenAdapter.parse(text) for text in ("a", "s3://b/c", "s3://b/c:0.5", "a:b:-2e-1")}
    assert {text: (one.location, one.weight) for text, one in found.items()} == {
        "a": ("a", 1.0),
        "s3://b/c": ("s3://b/c", 1.0),
        "s3://b/c:0.5": ("s3://b/c", 0.5),
        "a:b:-2e-1": ("a:b", -0.2),
    }
    for text in ("a:0", ":1", "a:nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected FOLDER:WEIGHT"):
            GivenAdapter.parse(text)
