"""The modules a family builds, against those transformers builds from the same configuration."""

import dataclasses
import logging
import math

import pytest
import torch
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils

from hypershard.config.schema import ModelConfig
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.models.family import family_of
from hypershard.models.files import available_models, model_file
from hypershard.models.llama4 import chunks_follow_documents


def transformers_model(model: ModelConfig, attention: str = "sdpa") -> PreTrainedModel:
    """transformers' own model with transformers' own first weights."""
    config = family_of(model.model_type).hf_config(model)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def built_with_weights_of(reference: PreTrainedModel, model: ModelConfig) -> PreTrainedModel:
    built = family_of(model.model_type).build(model)
    weights = {name: weight.clone() for name, weight in reference.state_dict().items()}
    missing, unexpected = built.load_state_dict(weights, assign=True)
    assert not missing
    assert not unexpected
    built.tie_weights()
    return built


def hidden_states(hf_model: PreTrainedModel, model: ModelConfig, ids: torch.Tensor, positions: torch.Tensor | None):
    backbone = family_of(model.model_type).backbone(hf_model)
    return backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", available_models())
def test_every_model_file_is_counted_as_it_is_built(name: str) -> None:
    model = resolve(Layer(name, read_yaml(model_file(name))[0])).config.model
    family = family_of(model.model_type)
    family.check(model)
    model = family.complete(model)
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=1000)
    built = family.build(model)
    specs = family.parameters(model)
    assert len({spec.name for spec in specs}) == len(specs)
    assert {spec.name: spec.shape for spec in specs} == {n: tuple(p.shape) for n, p in built.named_parameters()}
    assert [spec.name for spec in specs] == [n for n, _ in built.named_parameters()]
    assert all(parameter.is_meta for parameter in built.parameters())
    assert len(family.blocks(built)) == model.num_layers


def test_logits_are_those_of_transformers(model: ModelConfig) -> None:
    reference = transformers_model(model).eval()
    built = built_with_weights_of(reference, model).eval()
    ids = torch.randint(0, 97, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(built(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-6)


def test_buffers_have_the_values_of_a_normal_construction(model: ModelConfig) -> None:
    built, reference = family_of(model.model_type).build(model), transformers_model(model)
    ours, theirs = dict(built.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys()
    assert bool(ours) == (model.model_type != "gpt2")
    for name, buffer in ours.items():
        assert buffer.device.type == "cpu"
        assert torch.equal(buffer, theirs[name]), name


@pytest.mark.parametrize("model_type", ["llama_v3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_real_and_the_head_is_found(model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied)
    family = family_of(model_type)
    built = family.build(model)
    head = built.get_output_embeddings().weight
    assert head is built.lm_head.weight
    assert (head is built.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in {spec.name for spec in family.parameters(model)}) == (not tied)


def test_build_takes_the_fast_paths(model: ModelConfig) -> None:
    built = family_of(model.model_type).build(model)
    assert built.training
    assert built.config._attn_implementation == "sdpa"
    assert built.config.use_cache is False
    assert built.config.pad_token_id is None
    if model.model_type == "mixtral":
        assert built.config._experts_implementation == "grouped_mm"


def test_first_weights_have_transformers_distribution(model: ModelConfig) -> None:
    """transformers' own initialisation drawn once; each tensor must look like a sample of what the spec says."""
    weights = dict(transformers_model(model).named_parameters())
    for spec in family_of(model.model_type).parameters(model):
        weight = weights[spec.name].detach()
        if spec.init == "normal":
            spread = 6 / math.sqrt(2 * weight.numel())  # six standard errors of a sample's deviation
            assert weight.std().item() == pytest.approx(spec.std, rel=spread), spec.name
            assert abs(weight.mean().item()) < 6 * spec.std / math.sqrt(weight.numel()), spec.name
        else:
            assert torch.all(weight == {"zeros": 0.0, "ones": 1.0}[spec.init]), spec.name


def test_packed_documents_do_not_see_each_other(model: ModelConfig) -> None:
    built = built_with_weights_of(transformers_model(model), model).eval()
    ids = torch.randint(0, 97, (2, 48))
    other = ids.clone()
    other[:, :20] = (other[:, :20] + 1) % 97
    restarting = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
    with torch.no_grad():
        before, after = (hidden_states(built, model, tokens, restarting) for tokens in (ids, other))
        running = hidden_states(built, model, other, torch.arange(48).expand(2, -1))
        alone = hidden_states(built, model, ids[:, 20:], None)
    # Not bit for bit: how many tokens share an expert with one decides how its products are summed.
    torch.testing.assert_close(before[:, 20:], after[:, 20:], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, :20], after[:, :20], atol=1e-2)
    # The test can fail: without the restart the second document does see the first.
    assert not torch.allclose(running[:, 20:24], after[:, 20:24], atol=1e-2)
    if model.model_type != "llama4" or chunks_follow_documents():
        torch.testing.assert_close(before[:, 20:], alone, rtol=1e-4, atol=1e-5)


def test_attention_is_causal(model: ModelConfig) -> None:
    built = built_with_weights_of(transformers_model(model), model).eval()
    ids = torch.randint(0, 97, (1, 48))
    other = ids.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 97
    with torch.no_grad():
        before, after = (hidden_states(built, model, tokens, None) for tokens in (ids, other))
    torch.testing.assert_close(before[:, :30], after[:, :30], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "qwen2"])
def test_the_sliding_window_acts_in_every_layer(model_type: str) -> None:
    """A layer carries a change window - 1 tokens on, so four layers carry it four times as far and no further."""
    model = tiny_model(model_type, sliding_window=6)
    built = built_with_weights_of(transformers_model(model), model).eval()
    ids = torch.randint(0, 97, (1, 48))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 97
    with torch.no_grad():
        changed = hidden_states(built, model, ids, None) != hidden_states(built, model, other, None)
    reach = 4 * (6 - 1)
    assert changed[0, :reach].any(-1).all()
    assert not changed[0, reach + 1 :].any()


def grouped_mm_flops(left: torch.Size, right: torch.Size, *args: object, **kwargs: object) -> int:
    """aten._grouped_mm, which FlopCounterMode does not know: [S, K] x [E, K, N], or [K, S] x [S, N] for weights."""
    return 2 * left[0] * left[1] * right[-1]


def test_flops_are_those_that_run(model: ModelConfig) -> None:
    """Counted by torch as the model runs forward and backward, attention over the full square (eager)."""
    model = dataclasses.replace(model, sliding_window=None)
    if model.model_type == "llama4":
        model = dataclasses.replace(model, attention_chunk_size=48)
    built = built_with_weights_of(transformers_model(model), model)
    built.set_attn_implementation("eager")
    ids = torch.randint(0, 97, (2, 48))
    known = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        logits = built(ids).logits
        (logits * torch.randn_like(logits)).sum().backward()
    flops = family_of(model.model_type).flops_per_token(model, context_tokens=48)
    full_square = flops.matmul + 2 * flops.attention
    assert counter.get_total_flops() / ids.numel() == pytest.approx(full_square, rel=1e-3)


def test_llama4_warns_where_chunks_cut_documents(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("hypershard"), "propagate", True)
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence", raising=False)
    family_of("llama4").build(tiny_model("llama4", attention_chunk_size=48))
    assert "--attention_chunk_size" not in caplog.text
    family_of("llama4").build(tiny_model("llama4", attention_chunk_size=16))
    assert "--attention_chunk_size=16" in caplog.text
