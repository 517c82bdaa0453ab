"""What serving a model takes, by hand."""

import json

import pytest
from tests.plan_jobs import config_of

from hypershard.catalog.instances import instance
from hypershard.cli.plan import run
from hypershard.config.schema import ModelConfig
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.plan.serving import need_of, places_for

GIB = 2**30


def model(name: str) -> ModelConfig:
    found = config_of(name).model
    return family_of(found.model_type).complete(found)


def test_llama_3_8b_by_hand() -> None:
    """2 bytes a weight; 2 x 32 layers x 8 heads x 128 numbers of 2 bytes are 131,072 bytes a token."""
    need = need_of(model("llama3_8b"), bits=16, num_sequences=4)
    assert need.weight_bytes == 2 * 8_030_261_248
    assert need.cache_bytes == 4 * 8192 * 131_072 == 4 * GIB
    four = need_of(model("llama3_8b"), bits=4, num_sequences=4)
    outside = 2 * 128256 * 4096 + 4096  # embedding, output head, last norm
    assert four.weight_bytes == pytest.approx(2 * outside + 0.516 * (8_030_261_248 - outside))
    a10g, h100, unpriced = instance("g5.12xlarge"), instance("p5.48xlarge"), instance("p5e.48xlarge")
    prices = [(unpriced, None), (h100, h100.ec2), (a10g, a10g.ec2)]
    found = places_for(need, num_sequences=4, heads=8, prices=prices)
    assert [(one.instance.family, one.num_copies, one.num_gpus) for one in found] == [
        ("g5", 2, 2), ("p5", 8, 1), ("p5e", 8, 1)
    ]  # fmt: skip
    fast = found[1]
    assert fast.tokens_per_second == pytest.approx(8 * 4 * 3.35e12 / need.read_bytes)
    assert fast.dollars_per_million == pytest.approx(h100.ec2.dollars_per_hour / 3.6e-3 / fast.tokens_per_second)  # type: ignore[union-attr]
    assert found[2].dollars_per_million is None


def test_experts_that_no_token_uses_are_held_but_not_read() -> None:
    one = need_of(model("mixtral_8x7b"), bits=16, num_sequences=1)
    many = need_of(model("mixtral_8x7b"), bits=16, num_sequences=64)
    assert one.weight_bytes == many.weight_bytes == 2 * 46_702_792_704
    assert one.read_bytes - one.cache_bytes < 0.3 * one.weight_bytes
    assert many.read_bytes - many.cache_bytes == pytest.approx(many.weight_bytes, rel=0.01)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model=llama4_scout_17b_16e", "--serve=4"]) == 0
    assert "p4d.24xlarge" in capsys.readouterr().out
    assert run(["--model=llama3_8b", "--serve=1", "--serve_bits=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["places"][0]["dollars_per_hour"] > 0
    assert run(["--model=llama3_8b", "--serve=1", "--instance=p5,g5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["places"]) == 2
    assert run(["--model=llama3_8b", "--serve=1", "--instance=ml.g5.12xlarge", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["service"], found["places"][0]["dollars_per_hour"]) == ("sagemaker", 7.09)
    assert run(["--model=llama3_8b", "--serve=1", "--instance=ml.g5.12xlarge", "--service=ec2"]) == 0
    page = capsys.readouterr().out
    assert " 5.67 " in page and page.endswith("dollars are EC2's, on demand\n")
    with pytest.raises(ConfigError, match=r"with and without ml\.; say whose prices by --service"):
        run(["--model=llama3_8b", "--serve=1", "--instance=p5,ml.g5"])
    with pytest.raises(ConfigError, match="--search does nothing there"):
        run(["--model=llama3_8b", "--serve=1", "--search"])
    with pytest.raises(ConfigError, match="only with --serve"):
        run(["--model=llama3_8b", "--instance=p5", "--serve_bits=4"])
    with pytest.raises(ConfigError, match="--serve_bits=5: expected one of 16, 8, 4"):
        run(["--model=llama3_8b", "--serve=1", "--serve_bits=5"])
