"""Numbers that guides tell of models, each with the verdict that arithmetic, the catalog or the law gives it."""

import dataclasses

import pytest

from hypershard.config.schema import ModelConfig
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.errors import ConfigError
from hypershard.models.files import model_file
from hypershard.plan.claims.claims import Claims, Finding, Verdict, check_claims
from hypershard.plan.claims.memory import weight_gb

HOLDS, DISAGREES, IMPOSSIBLE = Verdict.HOLDS, Verdict.DISAGREES, Verdict.IMPOSSIBLE


def shape(name: str, **changes) -> ModelConfig:
    values, _ = read_yaml(model_file(name))
    return dataclasses.replace(resolve(Layer(name, values)).config.model, **changes)


def about(claim: str, **claims) -> Finding:
    found = [finding for finding in check_claims(Claims(**claims)) if finding.claim == claim]
    assert len(found) == 1, found
    return found[0]


def test_nothing_told_nothing_found() -> None:
    assert check_claims(Claims()) == []
    assert check_claims(Claims(num_tokens=1e9, mfu=0.4)) == []


def test_a_llama_of_1_29_billion() -> None:
    """Right with 6144 inside and an untied head, and so not 1.36 billion."""
    model = shape("llama_1_36b")
    right = about("num_parameters", model=model, num_parameters=1.29e9)
    assert (right.verdict, right.expected) == (HOLDS, "1.294B")
    wrong = about("num_parameters", model=model, num_parameters=1.36e9)
    assert (wrong.verdict, wrong.found) == (IMPOSSIBLE, "1.36B")
    tied = dataclasses.replace(model, tie_word_embeddings=True)
    assert about("num_parameters", model=tied, num_parameters=1.29e9).expected == "1.22B"


def test_b_gpt2_of_18_heads() -> None:
    """The count is right, and 2432 is no multiple of 18."""
    claimed = shape("gpt2_1_36b", num_heads=18)
    assert about("num_parameters", model=claimed, num_parameters=1.40e9).verdict == HOLDS
    finding = about("model", model=claimed)
    assert finding.verdict == IMPOSSIBLE
    assert "18" in finding.found
    assert "19" in finding.why
    assert check_claims(Claims(model=shape("gpt2_1_36b"))) == []


def test_c_scout_in_34_gb() -> None:
    """34 GB is what the 17 billion active parameters take; all 108 billion have to be held."""
    model = shape("llama4_scout_17b_16e")
    claims = {"model": model, "num_parameters": 108_641_793_536, "weight_format": "bf16"}
    finding = about("weights_gb", **claims, weights_gb=34.3)
    assert (finding.verdict, finding.expected) == (IMPOSSIBLE, "215.5 GB")  # 217 with the vision tower
    assert "17.17B that one token uses" in finding.why
    assert about("num_parameters", **claims).verdict == HOLDS
    on_g5 = about("num_gpus", **claims, instance="g5.12xlarge")
    assert (on_g5.verdict, on_g5.found) == (IMPOSSIBLE, "4 x A10G of 25.8 GB")
    in_nf4 = {"model": model, "weight_format": "nf4", "instance": "g5.12xlarge"}
    assert about("weights_gb", **in_nf4, weights_gb=58).verdict == HOLDS
    assert about("num_gpus", **in_nf4).verdict == HOLDS
    fused = about("weight_format", **in_nf4)
    assert fused.verdict == DISAGREES
    assert "3-D" in fused.why
    assert weight_gb(model, weight_format="nf4", quantises_experts=False) > 190


def test_c_without_the_shape_parameters_are_enough() -> None:
    finding = about("weights_gb", num_parameters=108_641_793_536, weight_format="bf16", weights_gb=34)
    assert (finding.verdict, finding.expected) == (IMPOSSIBLE, "217.3 GB")


@pytest.mark.parametrize(("rate", "mfu"), [(50_000, 0.35), (60_000, 0.40)])
def test_d_tokens_per_second_on_four_h20(rate: float, mfu: float) -> None:
    """The utilisation told is of the fp8 peak; in bf16 that rate would be 69 to 83%."""
    claims = {"num_parameters": 1.36e9, "gpu": "H20", "num_gpus": 4, "tokens_per_second": rate}
    finding = about("mfu", **claims, mfu=mfu)
    assert finding.verdict == IMPOSSIBLE
    assert {50_000: "68.9%", 60_000: "82.7%"}[rate] in finding.expected
    assert "fp8 peak of 296" in finding.why
    assert about("mfu", **claims | {"tokens_per_second": rate / 2}, mfu=mfu).verdict == HOLDS


def test_d_a_rate_beyond_the_peak_cannot_be() -> None:
    claims = {"num_parameters": 1.36e9, "gpu": "H20", "num_gpus": 4}
    assert about("tokens_per_second", **claims, tokens_per_second=80_000).verdict == IMPOSSIBLE
    assert about("tokens_per_second", **claims, tokens_per_second=60_000).verdict == DISAGREES
    assert about("tokens_per_second", **claims, tokens_per_second=30_000).verdict == HOLDS
    assert about("mfu", mfu=35).verdict == IMPOSSIBLE


def test_d_published_speeds_hold_by_either_convention() -> None:
    """torchtitan, Llama 3.1 8B on 8 H100, sequences of 8192: 5,762 tokens/s per GPU, 33% MFU (full square)."""
    claims = {"model": shape("llama3_1_8b"), "gpu": "H100 SXM", "num_gpus": 8, "tokens_per_second": 8 * 5762}
    assert about("mfu", **claims, mfu=0.33).verdict == HOLDS
    assert about("mfu", **claims, mfu=0.50).verdict == IMPOSSIBLE


def test_e_loss_after_85_and_after_6_billion_tokens() -> None:
    claims = {"num_parameters": 1.29e9, "loss_nats": 2.36}
    right = about("loss_nats", **claims, num_tokens=85e9)
    assert right.verdict == HOLDS
    assert "2.35 nats" in right.expected
    wrong = about("loss_nats", **claims, num_tokens=6e9)
    assert wrong.verdict == DISAGREES
    assert "2.70 nats" in wrong.expected
    assert "tokenizer" in wrong.why
    # 4.0 to 4.5 nats are told of 6B tokens; a model has them after 0.08 to 0.22 billion.
    early = about("loss_nats", num_parameters=1.29e9, num_tokens=6e9, loss_nats=4.5)
    assert early.verdict == DISAGREES
    never = about("loss_nats", num_parameters=1.29e9, num_tokens=6e9, loss_nats=1.5)
    assert "no number of tokens" in never.why
    assert check_claims(Claims(model=shape("mixtral_8x7b"), num_tokens=6e9, loss_nats=2.0)) == []


@pytest.mark.parametrize(
    ("name", "service", "dollars", "verdict", "expected"),
    [
        ("ml.g5.12xlarge", "sagemaker", 5.672, DISAGREES, "$7.09/h"),
        ("ml.g5.12xlarge", "ec2", 5.672, HOLDS, "$5.67/h"),
        ("ml.p4d.24xlarge", "sagemaker", 32.77, DISAGREES, "$25.25/h"),
        ("p4d.24xlarge", "ec2", 32.77, DISAGREES, "$21.96/h"),
    ],
)
def test_f_prices(name: str, service: str, dollars: float, verdict: Verdict, expected: str) -> None:
    finding = about("dollars_per_hour", instance=name, service=service, dollars_per_hour=dollars)
    assert finding.verdict == verdict
    assert finding.expected.startswith(expected)
    assert ("price of ec2" in finding.why) == (dollars == 5.672 and service == "sagemaker")


def test_f_refuses_what_the_catalog_does_not_know() -> None:
    with pytest.raises(ConfigError, match="p3"):
        check_claims(Claims(instance="p3.8xlarge", service="ec2", dollars_per_hour=12.24))
    with pytest.raises(ConfigError, match="service: found 'spot'"):
        check_claims(Claims(instance="p5", service="spot", dollars_per_hour=12.24))


def test_g_rope_base_of_llama_3() -> None:
    finding = about("model", model=shape("llama3_8b", rotary_emb_base=10_000.0))
    assert finding.verdict == IMPOSSIBLE
    assert "500000" in finding.why
    assert check_claims(Claims(model=shape("llama2_7b", rotary_emb_base=10_000.0))) == []
    changed = about("rotary_emb_base", model=shape("llama3_8b", rotary_emb_base=20_000.0), published=shape("llama3_8b"))
    assert (changed.verdict, changed.found, changed.expected) == (IMPOSSIBLE, "20000.0", "500000.0")


def test_h_llama_3_2_3b_with_11008_inside() -> None:
    claimed, published = shape("llama3_2_3b", intermediate_size=11008), shape("llama3_2_3b")
    finding = about("intermediate_size", model=claimed, published=published)
    assert (finding.verdict, finding.found, finding.expected) == (IMPOSSIBLE, "11008", "8192")
    assert "3.939B" in finding.why
    assert "3.213B" in finding.why
    assert about("num_parameters", model=claimed, num_parameters=3.21e9).verdict == IMPOSSIBLE
    assert check_claims(Claims(model=published, published=published)) == []


def test_i_qlora_of_32_billion_on_p4d() -> None:
    """4.1 GB per GPU is int8's share; 10 to 14 hours would use 6 to 9% of the peak."""
    model = shape("deepseek_r1_distill_qwen_32b")
    claims = {"model": model, "weight_format": "nf4", "instance": "p4d.24xlarge", "num_tokens": 39.3e6}
    memory = about("weights_gb_per_gpu", **claims, weights_gb_per_gpu=4.1)
    assert (memory.verdict, memory.expected) == (DISAGREES, "2.40 GB")
    assert "19.21 GB where each GPU has all" in memory.why
    assert "int8" in memory.why
    assert about("weights_gb_per_gpu", **claims, weights_gb_per_gpu=2.4).verdict == HOLDS
    for hours in (10.0, 14.0):
        slow = about("hours", **claims, hours=hours)
        assert slow.verdict == DISAGREES
    assert about("hours", **claims, hours=4.0).verdict == HOLDS
    assert about("hours", **claims, hours=0.5).verdict == IMPOSSIBLE


def test_hours_tokens_and_rate_belong_together() -> None:
    claims = {"num_tokens": 3.6e9, "tokens_per_second": 100_000}
    assert about("hours", **claims, hours=10.4).verdict == HOLDS
    assert about("hours", **claims, hours=5).verdict == IMPOSSIBLE
    late = about("hours", **claims, hours=20)
    assert (late.verdict, late.expected) == (DISAGREES, "10.0 h, and start, saves and validation")


def test_refuses_numbers_that_are_none_and_names_that_are_unknown() -> None:
    with pytest.raises(ConfigError, match="hours: found -1"):
        Claims(hours=-1)
    with pytest.raises(ConfigError, match="gpu: found 'H99'"):
        check_claims(Claims(num_parameters=1e9, gpu="H99", num_gpus=1, tokens_per_second=1))
    with pytest.raises(ConfigError, match="weight_format: found 'int3'"):
        check_claims(Claims(num_parameters=1e9, weight_format="int3"))


def test_a_finding_reads_as_a_sentence() -> None:
    finding = about("weights_gb", num_parameters=1e9, weight_format="bf16", weights_gb=1)
    assert str(finding) == ("weights_gb cannot be true: found 1.0 GB, expected 2.0 GB (1B parameters in bf16)")
