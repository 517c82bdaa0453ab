from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_texts import documents
from prepared import decoded

from hypershard.cli import prepare
from hypershard.data.bins.meta import read_meta
from hypershard.data.bins.recipes import RECIPES
from hypershard.data.bins.token_bins import open_token_bins
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.errors import ConfigError


@pytest.fixture
def slimpajama(tmp_path):
    """SlimPajama-6B's layout with a few rows in each file; the test split must not be read."""
    folder = tmp_path / "SlimPajama-6B"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\ndataset_info:\n  features: []\n---\n# SlimPajama-6B\n")
    files = [
        *(f"train-{i:05d}-of-00048-ab1ff05840b16711" for i in range(3)),
        "validation-00000-of-00001-6b1d",
        "test-00000-of-00001-5a1",
    ]
    for number, name in enumerate(files):
        texts = [f"{name.split('-')[0]} {number} {text}" for text in documents(20)]
        table = pyarrow.table(
            {
                "text": texts,
                "meta": [{"redpajama_set_name": "RedPajamaC4"}] * 20,
                "__index_level_0__": list(range(20)),
            }
        )
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=8)
    return folder


def words(*argv):
    return [str(word) for word in argv]


@pytest.mark.parametrize("name", RECIPES)
def test_a_local_copy_is_prepared(slimpajama, tmp_path, capsys, name):
    output = tmp_path / "bins"
    flags = words("--output", output, "--dataset_location", slimpajama, "--tokenizer", TOKENIZER_PATH)
    assert prepare.run([name, *flags]) == 0
    train, val = open_token_bins(output)
    assert (train.num_documents, val.num_documents) == (60, 20)
    assert all(text.startswith("train") for text in decoded(train))
    assert all(text.startswith("validation 3") for text in decoded(val))
    assert f"hypershard train --dataset {output}" in capsys.readouterr().out
    assert read_meta(output).train.targets is None


def test_every_recipe_says_where_it_comes_from():
    for recipe in RECIPES.values():
        for name in (recipe.dataset, recipe.tokenizer):
            assert any(source.endswith(name) for source in recipe.sources)


def test_flags_that_contradict_a_recipe_are_refused(slimpajama, tmp_path):
    flags = words("--output", tmp_path / "bins", "--dataset_location", slimpajama)
    with pytest.raises(ConfigError, match="--text_field=content: slimpajama_6b_gpt2 has text"):
        prepare.run(["slimpajama_6b_gpt2", *flags, "--text_field", "content"])
    with pytest.raises(ConfigError, match=r"--dataset_location.*goes with slimpajama_6b_llama"):
        prepare.run(["embedded", *flags])


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        prepare.run(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown and recipe.about in shown for name, recipe in RECIPES.items())


def test_a_row_without_the_text_is_named(slimpajama, tmp_path):
    path = slimpajama / "data" / "train-00001-of-00048-ab1ff05840b16711.parquet"
    table = pyarrow.parquet.read_table(path)
    texts = table["text"].to_pylist()
    texts[11] = None
    pyarrow.parquet.write_table(table.set_column(0, "text", pyarrow.array(texts)), path, row_group_size=8)
    flags = words("--output", tmp_path / "bins", "--dataset_location", slimpajama, "--tokenizer", TOKENIZER_PATH)
    with pytest.raises(Exception, match=r"train-00001-of-00048.*row 12: .*--malformed_rows=skip"):
        prepare.run(["slimpajama_6b_llama", *flags])
    assert prepare.run(["slimpajama_6b_llama", *flags, "--malformed_rows", "skip"]) == 0
    assert json.loads((tmp_path / "bins" / "meta.json").read_text())["num_malformed_rows"] == 1
