"""Model files: found by name, complete, and saying where their sizes come from."""

import dataclasses
from pathlib import Path

import pytest

from hypershard.config.schema import MODEL_TYPES
from hypershard.config.sources import Layer, read_yaml, resolve
from hypershard.errors import ConfigError
from hypershard.models.family import family_of
from hypershard.models.files import available_models, model_file

NAMES = available_models()
# Said even where they equal a default: they are what the file is about.
SIZES = {
    "max_position_embeddings",
    "model_type",
    "hidden_width",
    "num_layers",
    "num_heads",
    "max_context_width",
    "intermediate_size",
}


def test_the_promised_files_are_there() -> None:
    tiny = {"tiny_llama", "tiny_llama2", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4"}
    published = {
        "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_1_8b", "llama3_1_70b", "llama3_2_1b",
        "llama3_2_3b", "mathstral_7b", "mixtral_8x7b", "deepseek_r1_distill_qwen_32b", "llama4_scout_17b_16e",
        "llama_1_36b", "gpt2_1_36b",
    }  # fmt: skip
    assert tiny | published <= set(NAMES)
    types = {resolve(Layer(n, read_yaml(model_file(n))[0])).config.model.model_type for n in tiny}
    assert types == set(MODEL_TYPES)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_its_source_and_is_accepted(name: str) -> None:
    path = model_file(name)
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# https://huggingface.co/", "# made for demos and tests"))
    values, other = read_yaml(path)
    assert other is None
    model = resolve(Layer(name, values)).config.model
    family = family_of(model.model_type)
    family.check(model)
    if first.startswith("# https"):
        assert model.vocab_size is not None
        assert model.max_position_embeddings is not None, "a longer --max_context_width would pass unnoticed"
    # A line that only repeats what the family or the schema says anyway is noise.
    for key in set(values) - SIZES:
        without = resolve(Layer(name, {k: v for k, v in values.items() if k != key})).config
        with_it = resolve(Layer(name, values)).config
        completed = (dataclasses.replace(config, model=family.complete(config.model)) for config in (without, with_it))
        assert next(completed) != next(completed), f"{key} changes nothing"


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("num_layers: 2\n")
    assert model_file(str(path)) == path
    with pytest.raises(ConfigError, match="no such file"):
        model_file(str(tmp_path / "other.yaml"))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--model=llama3_8B_.*llama3_8b"):
        model_file("llama3_8B_")
    with pytest.raises(ConfigError, match=r"known are .*tiny_llama"):
        model_file("zzz")
