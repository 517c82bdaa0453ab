"""Adapters by themselves: which weights get them, PEFT's format in both directions, merging."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.tiny_models import tiny_model

from hypershard.adapters.lora import add_adapters, bit_sum
from hypershard.adapters.merge import merge_box
from hypershard.adapters.peft_format import PeftAdapter, load_peft, open_peft, save_peft
from hypershard.adapters.targets import Target, adapter_specs, adapter_targets, scale_of
from hypershard.config.checks import check
from hypershard.config.schema import AdapterConfig, CheckpointConfig, Config, ModelConfig, TrainConfig
from hypershard.errors import CheckpointError, ConfigError
from hypershard.models.family import family_of
from hypershard.parallel.init import materialise

CPU = torch.device("cpu")
FAMILIES = ("llama_v2", "llama_v3", "mixtral", "qwen2", "gpt2", "llama4")


def adapted(model: ModelConfig, adapters: AdapterConfig, *, seed: int) -> tuple[Any, list[Target]]:
    """The model on the CPU with adapters, all numbers random, in evaluation."""
    targets = adapter_targets(model, adapters)
    hf_model = family_of(model.model_type).build(model)
    add_adapters(hf_model, targets, adapters=adapters, frozen_dtype=torch.float32)
    materialise(hf_model, parameter_device=CPU, buffer_device=CPU)
    torch.manual_seed(seed)
    for name, parameter in hf_model.named_parameters():
        parameter.data.normal_(0.0, 0.2 if "lora_" in name else 0.08)
    return hf_model.eval(), targets


def plain(hf_model: Any, model: ModelConfig) -> Any:
    """transformers' own model with the frozen weights of `hf_model`."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(family_of(model.model_type).hf_config(model), dtype=torch.float32)
    weights = {name: one for name, one in hf_model.state_dict().items() if "lora_" not in name}
    base.load_state_dict(weights)
    return base.eval()


@torch.no_grad()
def logits(hf_model: Any) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) * 7 % 97
    return hf_model(input_ids=ids, use_cache=False).logits


def tensors_of(hf_model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in hf_model.named_parameters() if "lora_" in name}


def opened(folder: Path) -> PeftAdapter:
    return open_peft(str(folder), flag="--lora_init_from")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("lora_targets", ["all-linear", "some"])
def test_peft_computes_the_same_with_what_was_saved_and_its_own_is_read(
    tmp_path: Path, model_type: str, lora_targets: str
) -> None:
    from peft import PeftModel

    some = {"mixtral": "q_proj,experts.down_proj", "llama4": "experts.gate_up_proj,down_proj", "gpt2": "mlp.c_proj"}
    names = lora_targets if lora_targets == "all-linear" else some.get(model_type, "q_proj, v_proj,mlp.down_proj")
    adapters = AdapterConfig(lora_r=8, lora_alpha=12, lora_targets=names, lora_rslora=names != "all-linear")
    model = tiny_model(model_type)
    ours, targets = adapted(model, adapters, seed=1)
    save_peft(tmp_path, tensors_of(ours), targets, adapters=adapters, base="somewhere", training={})
    theirs = PeftModel.from_pretrained(plain(ours, model), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(theirs.get_base_model()), logits(plain(ours, model)), atol=1e-3)

    # And back: what PEFT itself writes, with other numbers.
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    load_peft(opened(tmp_path / "theirs"), adapters, targets, dict(ours.named_parameters()))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_weights_compute_what_the_adapters_did(model_type: str) -> None:
    """float32: the sum's rounding alone, some 1e-7 of a weight, grows to 1e-5 of a logit of order 1."""
    adapters = AdapterConfig(lora_r=8)
    model = tiny_model(model_type)
    ours, targets = adapted(model, adapters, seed=3)
    whole, tensors = plain(ours, model), tensors_of(ours)
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for target in targets:
            weight = weights[target.matrix.spec.name]
            a, b = tensors[target.a.name], tensors[target.b.name]
            merged = merge_box(weight.detach(), target, a, b, scale=scale_of(adapters), offsets=[0] * weight.ndim)
            # A box of it, as one of several files may hold, is merged by itself.
            box = tuple(slice(1, size) for size in weight.shape)
            offsets = [1] * weight.ndim
            part = merge_box(weight.detach()[box], target, a, b, scale=scale_of(adapters), offsets=offsets)
            torch.testing.assert_close(part, merged[box])
            low = merge_box(
                weight.detach().bfloat16(), target, a, b, scale=scale_of(adapters), offsets=[0] * weight.ndim
            )
            assert low.dtype == torch.bfloat16  # rounded twice: the weight before, the sum after
            torch.testing.assert_close(low.float(), merged, rtol=2**-7, atol=2**-8)
            weight.copy_(merged)
    torch.testing.assert_close(logits(whole), logits(ours), rtol=1e-5, atol=1e-5)


def test_all_linear_is_what_peft_takes_for_it_and_the_experts() -> None:
    """Every nn.Linear and Conv1D of the blocks by PEFT's own rule (all but the head), and the experts' tensors.

    Mixtral is left out: there PEFT takes the router and the experts under their former names.
    """
    from peft import LoraConfig, get_peft_model

    for model_type in ("llama_v2", "qwen2", "gpt2", "llama4"):
        model = tiny_model(model_type)
        hf_model = family_of(model_type).build(model)
        theirs = get_peft_model(hf_model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        found = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            for name, _ in theirs.named_parameters()
            if "lora_A" in name
        }
        routers = {
            name for name in found if name.endswith(".router")
        }  # PEFT's wrapper cannot even run those of Llama 4
        ours = adapter_targets(model, AdapterConfig(lora_r=8))
        assert {one.matrix.name for one in ours if not one.matrix.num_experts} == found - routers, model_type
        num_experts_tensors = 2 * model.num_layers if model_type == "llama4" else 0
        assert sum(bool(one.matrix.num_experts) for one in ours) == num_experts_tensors


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("llama_v2", {"lora_targets": "q_porj"}, "did you mean q_proj?"),
        ("llama_v2", {"lora_targets": "lm_head"}, "no matrix of the blocks"),
        ("llama_v2", {"lora_targets": "q_proj,"}, "''"),
        ("mixtral", {"lora_targets": "all_linear"}, "expected all-linear"),
        ("mixtral", {"lora_targets": "gate"}, "'gate' is no matrix"),
        ("mixtral", {"lora_r": 4}, "multiple of 8"),
    ],
)
def test_wrong_targets_are_refused(model_type: str, settings: dict, named: str) -> None:
    adapters = dataclasses.replace(AdapterConfig(lora_r=8), **settings)
    with pytest.raises(ConfigError) as error:
        adapter_targets(dataclasses.replace(tiny_model(model_type), vocab_size=None), adapters)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Config(adapters=AdapterConfig(lora_alpha=8)), "--lora_alpha=8 acts only with adapters"),
        (Config(adapters=AdapterConfig(lora_targets="q_proj")), "--lora_targets=q_proj acts only"),
        (Config(adapters=AdapterConfig(lora_r=8, lora_dropout=1)), "--lora_dropout=1"),
        (
            Config(
                adapters=AdapterConfig(lora_r=8),
                train=TrainConfig(init_from="resume"),
                checkpoint=CheckpointConfig(checkpoint_dir="somewhere"),
            ),
            "--init_from=resume",
        ),
    ],
)
def test_settings_that_cannot_act_are_refused(config: Config, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(config)


def test_other_adapters_in_a_folder_are_refused(tmp_path: Path) -> None:
    adapters, model = AdapterConfig(lora_r=8), tiny_model("llama_v2")
    ours, targets = adapted(model, adapters, seed=1)
    save_peft(tmp_path, tensors_of(ours), targets, adapters=adapters, base=None, training={})
    parameters = dict(ours.named_parameters())
    with pytest.raises(ConfigError, match="--lora_alpha=16"):
        load_peft(opened(tmp_path), dataclasses.replace(adapters, lora_alpha=8), targets, parameters)
    fewer = dataclasses.replace(adapters, lora_targets="q_proj")
    with pytest.raises(CheckpointError, match=r"lora_A.weight: found in the folder"):
        load_peft(opened(tmp_path), fewer, adapter_targets(model, fewer), parameters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, named in (
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),  # its A and B are not the whole update
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"of_a_version_to_come": 1}, "of_a_version_to_come"),
        ({"r": True}, "lora_r True"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"use_rslora": "false"}, "lora_rslora 'false'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=named):
            load_peft(opened(tmp_path), adapters, targets, parameters)


def test_bit_sums_see_any_change_and_no_precision() -> None:
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    assert bit_sum(weight) == bit_sum(weight.bfloat16())
    changed = weight.clone()
    changed[17, 3] *= 1.01
    assert bit_sum(changed) != bit_sum(weight)
    assert bit_sum(weight[:100]) + bit_sum(weight[100:]) == bit_sum(weight)


def test_specs_are_what_the_modules_hold() -> None:
    for model_type in FAMILIES:
        model = tiny_model(model_type)
        ours, targets = adapted(model, AdapterConfig(lora_r=8), seed=0)
        trained = {name: tuple(one.shape) for name, one in ours.named_parameters() if one.requires_grad}
        assert trained == {spec.name: spec.shape for spec in adapter_specs(targets)}
