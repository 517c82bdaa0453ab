"""Names, sizes, arithmetic and refusals: everything a family says without torch."""

import dataclasses
import subprocess
import sys

import pytest
from tiny_models import tiny_model

from hypershard.config.schema import MODEL_TYPES, ModelConfig
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.errors import ConfigError
from hypershard.models.base import nearest_divisor
from hypershard.models.family import active_parameter_count, family_of, parameter_count
from hypershard.models.files import model_file


def from_file(name: str) -> ModelConfig:
    return resolve(Layer(name, read_yaml(model_file(name))[0])).config.model


@pytest.mark.parametrize(
    ("name", "count", "active"),
    [
        ("llama2_7b", 6_738_415_616, None),
        ("llama3_8b", 8_030_261_248, None),
        ("llama3_1_8b", 8_030_261_248, None),
        ("llama3_1_70b", 70_553_706_496, None),
        ("llama3_2_1b", 1_235_814_400, None),
        ("llama3_2_3b", 3_212_749_824, None),
        ("mathstral_7b", 7_248_023_552, None),
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("deepseek_r1_distill_qwen_32b", 32_763_876_352, None),
        ("llama4_scout_17b_16e", 107_769_861_120, 17_172_894_720),
        ("llama_1_36b", 1_294_159_104, None),
        ("gpt2_1_36b", 1_405_338_496, None),
    ],
)
def test_published_models_have_their_published_size(name: str, count: int, active: int | None) -> None:
    model = from_file(name)
    assert parameter_count(model) == count
    assert active_parameter_count(model) == (active or count)


def test_llama3_8b_flops_are_those_others_report() -> None:
    """6 x 7.505e9 + 6 x 32 x 4096 x 8192: 51.5 GFLOP per token, the figure behind published MFU at 8192."""
    flops = family_of("llama_v3").flops_per_token(from_file("llama3_8b"), context_tokens=8192)
    assert flops.attention == 6 * 32 * 4096 * 8192
    assert flops.total == pytest.approx(51.5e9, rel=2e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_complete_leaves_only_what_does_not_apply(model_type: str) -> None:
    family = family_of(model_type)
    model = family.complete(ModelConfig(model_type=model_type))
    still_open = {field.name for field in dataclasses.fields(model) if getattr(model, field.name) is None}
    not_mine = {"sliding_window"} | ({"rotary_emb_base"} if model_type == "gpt2" else set())
    if model_type not in ("mixtral", "llama4"):
        not_mine |= {"num_experts", "experts_per_token"}
    assert still_open == {"vocab_size"} | not_mine
    assert family.complete(model) == model
    family.check(model)  # what complete() fills in is never refused


@pytest.mark.parametrize(
    ("model_type", "base"),
    [("llama_v2", 1e4), ("llama_v3", 5e5), ("mistral", 1e6), ("mixtral", 1e6), ("qwen2", 1e6), ("llama4", 5e5)],
)
def test_rope_base_is_the_familys(model_type: str, base: float) -> None:
    assert family_of(model_type).complete(ModelConfig(model_type=model_type)).rotary_emb_base == base


def test_given_values_are_kept() -> None:
    given = ModelConfig(model_type="llama_v3", rotary_emb_base=123.0, intermediate_size=99, tie_word_embeddings=True)
    model = family_of("llama_v3").complete(given)
    assert (model.rotary_emb_base, model.intermediate_size, model.tie_word_embeddings) == (123.0, 99, True)


@pytest.mark.parametrize(("width", "inner"), [(64, 256), (96, 256), (256, 768), (4096, 11008)])
def test_default_intermediate_size(width: int, inner: int) -> None:
    model = ModelConfig(model_type="llama_v2", hidden_width=width)
    assert family_of("llama_v2").complete(model).intermediate_size == inner
    gpt2 = ModelConfig(model_type="gpt2", hidden_width=width)
    assert family_of("gpt2").complete(gpt2).intermediate_size == 4 * width


@pytest.mark.parametrize(
    ("settings", "must_say"),
    [
        ({"model_type": "gpt2", "hidden_width": 2432, "num_heads": 18}, ("2432", "18", "19", "--num_heads")),
        ({"model_type": "llama_v2", "hidden_width": 100, "num_heads": 8}, ("100", "8", "--num_heads")),
        ({"model_type": "llama_v2", "hidden_width": 60, "num_heads": 4}, ("15", "odd", "--head_width")),
        ({"model_type": "llama_v3", "num_heads": 4, "num_key_value_heads": 3}, ("3", "--num_key_value_heads")),
        ({"model_type": "gpt2", "num_key_value_heads": 2}, ("2", "--num_key_value_heads")),
        ({"model_type": "gpt2", "head_width": 32}, ("32", "64", "--head_width")),
        ({"model_type": "gpt2", "rotary_emb_base": 10000.0}, ("--rotary_emb_base",)),
        ({"model_type": "gpt2", "rope_scaling": "llama3"}, ("--rope_scaling",)),
        ({"model_type": "mistral", "rope_scaling": "llama3"}, ("--rope_scaling",)),
        ({"model_type": "llama_v3", "rope_scaling_factor": 32.0}, ("--rope_scaling_factor", "--rope_scaling=llama3")),
        ({"model_type": "llama_v3", "rotary_emb_base": 10000.0}, ("500000", "--rotary_emb_base")),
        (
            {
                "model_type": "llama_v3",
                "hidden_width": 3072,
                "num_layers": 28,
                "num_heads": 24,
                "intermediate_size": 11008,
            },
            ("11008", "8192", "3.94B", "--intermediate_size"),
        ),
        ({"model_type": "llama_v3", "sliding_window": 128}, ("--sliding_window",)),
        ({"model_type": "gpt2", "sliding_window": 128}, ("--sliding_window",)),
        ({"model_type": "llama_v3", "resid_pdrop": 0.1}, ("--resid_pdrop",)),
        ({"model_type": "mixtral", "embd_pdrop": 0.1}, ("--embd_pdrop",)),
        ({"model_type": "llama_v3", "attention_chunk_size": 64}, ("--attention_chunk_size",)),
        ({"model_type": "llama_v3", "num_experts": 8}, ("--num_experts",)),
        ({"model_type": "qwen2", "experts_per_token": 2}, ("--experts_per_token",)),
        ({"model_type": "gpt2", "router_loss_weight": 0.01}, ("--router_loss_weight",)),
        ({"model_type": "mixtral", "experts_per_token": 9}, ("9", "8", "--experts_per_token")),
        ({"model_type": "llama4", "num_experts": 2, "experts_per_token": 3}, ("--experts_per_token",)),
        (
            {"model_type": "llama_v2", "max_context_width": 512, "max_position_embeddings": 256},
            ("512", "256", "--max_context_width"),
        ),
    ],
)
def test_what_cannot_be_or_cannot_act_is_refused(settings: dict[str, object], must_say: tuple[str, ...]) -> None:
    model = ModelConfig(**settings)  # type: ignore[arg-type]
    family = family_of(model.model_type)
    for candidate in (model, family.complete(model)):
        with pytest.raises(ConfigError) as refusal:
            family.check(candidate)
        for text in must_say:
            assert text in str(refusal.value)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--model_type=mixtrel.*did you mean mixtral"):
        family_of("mixtrel")


def test_an_open_vocabulary_is_refused_by_name() -> None:
    for model_type in MODEL_TYPES:
        with pytest.raises(ConfigError, match="--vocab_size"):
            parameter_count(ModelConfig(model_type=model_type))


@pytest.mark.parametrize(
    ("number", "wanted", "nearest"), [(2432, 18, 19), (12, 5, 6), (7, 3, 1), (8, 100, 8), (8, 8, 8)]
)
def test_nearest_divisor(number: int, wanted: int, nearest: int) -> None:
    assert nearest_divisor(number, wanted) == nearest


@pytest.mark.parametrize("context", [8, 16, 40, 48])
def test_attended_tokens_are_the_masks_means(context: int) -> None:
    """Against the masks counted out; the formulas leave out half a token per row, as published FLOP counts do."""

    def mean(sees: object) -> float:
        return sum(sees(row, column) for row in range(context) for column in range(row + 1)) / context  # type: ignore[operator]

    whole = mean(lambda row, column: True)
    window = mean(lambda row, column: row - column < 12)
    chunk = mean(lambda row, column: row // 16 == column // 16)
    expected = {"llama_v2": [whole] * 4, "mistral": [window] * 4, "llama4": [chunk, chunk, chunk, whole]}
    for model_type, means in expected.items():
        got = family_of(model_type).attended_tokens(tiny_model(model_type), context_tokens=context)
        assert got == pytest.approx(means, abs=0.5 + 1e-9)
        assert all(ours <= exact for ours, exact in zip(got, means, strict=True))


def test_weight_decay_spares_norms_and_biases(model: ModelConfig) -> None:
    for spec in family_of(model.model_type).parameters(model):
        assert spec.decay == (len(spec.shape) > 1), spec.name
        assert spec.decay == (spec.init == "normal"), spec.name


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from hypershard.models.family import *; from hypershard.models.files import *;"
        "from hypershard.config.schema import ModelConfig;"
        "parameter_count(ModelConfig(vocab_size=100)); available_models();"
        "family_of('llama4').flops_per_token(ModelConfig(model_type='llama4', vocab_size=9), context_tokens=64);"
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
