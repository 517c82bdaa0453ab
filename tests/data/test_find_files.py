"""Which files a name of --dataset means, their order and their splits."""

from __future__ import annotations

import gzip
import json

import boto3
import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.conftest import BUCKET

from hypershard.data.read.cards import glob_pattern
from hypershard.data.read.documents import read_documents
from hypershard.data.read.files import find_files
from hypershard.data.read.formats import Format, format_of
from hypershard.data.records import WHOLE
from hypershard.errors import DataError

# The cards of allenai/c4 and DKYoon/SlimPajama-6B, shortened to what says where files are.
C4_CARD = """---
pretty_name: C4
language: [en]
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: en.noblocklist
  data_files:
  - split: train
    path: en.noblocklist/c4-train.*.json.gz
  - split: validation
    path: en.noblocklist/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
# C4
"""
SLIMPAJAMA_CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
  - split: test
    path: data/test-*
---
"""


def touch(folder, *names, content="text"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def find(location, config=None):
    return find_files(str(location), dataset_config_name=config, cache_dir=None)


def found(folder, config=None):
    """Path below the folder -> split."""
    return {file.location.removeprefix(f"{folder}/"): file.split for file in find(folder, config)}


def configs(text):
    return f"---\nconfigs:\n{text}\n---\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("deep.dir/c4-train.00000-of-01024.json.gz", ("jsonl", ".gz")),
        ("A.TXT.ZST", ("txt", ".zst")),
        ("b.jsonl.bz2", ("jsonl", ".bz2")),
        ("train-00000-of-00048-ab349ee4bbde24e2.parquet", ("parquet", "")),
        ("data-00000-of-00001.arrow", ("arrow", "")),
        ("a.parquet.gz", None),
        ("a.csv", None),
        ("a.gz", None),
        ("x/tokenizer.json", None),
        ("dataset_info.json", None),
        ("LICENSE", None),
    ],
)
def test_the_end_of_a_name_says_the_format(name, expected):
    assert format_of(name) == (expected and Format(name=expected[0], packing=expected[1]))


def test_names_choose_the_split(tmp_path, caplog):
    touch(
        tmp_path, "train/a.txt", "c4-validation.00000.txt", "deep/val.txt", "README.txt", ".hidden/train.txt", "x.bin"
    )
    assert found(tmp_path) == {"c4-validation.00000.txt": "val", "deep/val.txt": "val", "train/a.txt": "train"}
    assert "1 files are not read, because others are named train or val" in caplog.text


def test_words_that_only_begin_like_a_split_do_not_choose_one(tmp_path):
    touch(tmp_path, "trainspotting.txt", "valley.txt", "b/values.txt")
    assert set(found(tmp_path).values()) == {None} and len(found(tmp_path)) == 3


def test_files_named_test_are_never_read_beside_train(tmp_path):
    touch(tmp_path, "test.jsonl", "train.jsonl")
    assert found(tmp_path) == {"train.jsonl": "train"}
    touch(tmp_path / "only", "test.jsonl")
    assert found(tmp_path / "only") == {"test.jsonl": None}


def test_what_holds_no_text_is_refused(tmp_path):
    touch(tmp_path, "a/x.csv", "only/val.txt", "none/.hidden")
    with pytest.raises(DataError, match=r"found x\.csv; expected files that end in \.jsonl"):
        find(tmp_path / "a")
    with pytest.raises(DataError, match="another kind"):
        find(tmp_path / "a" / "x.csv")
    with pytest.raises(DataError, match="nothing there"):
        find(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="nothing there"):
        find(tmp_path / "missing")
    with pytest.raises(DataError, match="found nothing; expected"):
        find(tmp_path / "none")
    with pytest.raises(DataError, match="only validation files"):
        find(tmp_path / "only")
    with pytest.raises(DataError, match=r"found a gs:// URI"):
        find("gs://bucket/a")


def test_one_file_is_itself_whatever_its_name(tmp_path, monkeypatch):
    touch(tmp_path, "validation.txt")
    monkeypatch.chdir(tmp_path)
    (file,) = find("validation.txt")
    assert (file.location, file.size_bytes, file.split) == (str(tmp_path / "validation.txt"), 4, None)
    touch(tmp_path, "validation.txt", content="other")
    assert find("validation.txt")[0].version != file.version
    with pytest.raises(DataError, match=r"--dataset_config_name=en: .*expected the flag left out"):
        find("validation.txt", "en")


def c4(folder):
    for config in ("en", "en.noblocklist", "realnewslike"):
        for name in ("train.00001-of-00002", "train.00000-of-00002", "validation.00000-of-00001"):
            path = folder / config / f"c4-{name}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(json.dumps({"text": f"{config} {name}"}).encode()))
    (folder / "README.md").write_text(C4_CARD)
    return folder


def test_a_copy_of_c4_is_read_by_its_card(tmp_path):
    c4(tmp_path)
    assert found(tmp_path, "en") == {
        "en/c4-train.00000-of-00002.json.gz": "train",
        "en/c4-train.00001-of-00002.json.gz": "train",
        "en/c4-validation.00000-of-00001.json.gz": "val",
    }
    assert set(found(tmp_path, "realnewslike").values()) == {"train"}
    (document,) = read_documents(find(tmp_path, "en.noblocklist")[0], columns=("text",), part=WHOLE, skip=0)
    assert json.loads(document.content) == {"text": "en.noblocklist train.00000-of-00002"}
    with pytest.raises(DataError, match=r"3 configurations and no default; --dataset_config_name chooses .* en, en\."):
        find(tmp_path)
    with pytest.raises(DataError, match=r"--dataset_config_name=fr: .*expected en, en\.noblocklist, realnewslike"):
        find(tmp_path, "fr")
    assert find(tmp_path / "en") and set(found(tmp_path / "en").values()) == {"train", "val"}


def test_a_copy_of_slimpajama_is_read_by_its_card_without_its_test_split(tmp_path, caplog):
    table = pa.table({"text": ["a", "b"], "meta": [{"set": "c4"}] * 2, "__index_level_0__": [0, 1]})
    (tmp_path / "data").mkdir()
    for name in (
        "train-00001-of-00048-4",
        "train-00000-of-00048-a",
        "validation-00000-of-00001-f",
        "test-00000-of-1",
    ):
        parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text(SLIMPAJAMA_CARD)
    expected = {
        "data/train-00000-of-00048-a.parquet": "train",
        "data/train-00001-of-00048-4.parquet": "train",
        "data/validation-00000-of-00001-f.parquet": "val",
    }
    assert found(tmp_path) == found(tmp_path, "default") == expected
    assert "test-00000-of-1.parquet" in caplog.text
    (tmp_path / "README.md").unlink()
    assert found(tmp_path) == expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("- config_name: x\n  data_files: '*.jsonl'", {"a.jsonl": None, "b.jsonl": None}),
        ("- config_name: x\n  data_files: [b.jsonl, a.jsonl]", {"a.jsonl": None, "b.jsonl": None}),
        ("- data_files:\n    train: a.jsonl\n    validation: [b.jsonl]", {"a.jsonl": "train", "b.jsonl": "val"}),
        ("- data_dir: deep", {"deep/train/c.jsonl": "train", "deep/val/d.jsonl": "val"}),
        ("- data_dir: deep\n  data_files: '**/c.*'", {"deep/train/c.jsonl": "train"}),
        ("- data_files: deep", {"deep/train/c.jsonl": "train", "deep/val/d.jsonl": "val"}),
        (
            "- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n  default: true",
            {"b.jsonl": None},
        ),
        ("- config_name: one\n  data_files: a.jsonl\n- config_name: default\n  data_files: b.jsonl", {"b.jsonl": None}),
        (
            "- data_files:\n  - {split: train_sft, path: a.jsonl}\n  - {split: test_sft, path: b.jsonl}",
            {"a.jsonl": "train"},
        ),
    ],
)
def test_every_shape_of_a_card(tmp_path, card, expected):
    touch(tmp_path, "a.jsonl", "b.jsonl", "deep/train/c.jsonl", "deep/val/d.jsonl", "deep/.cache/train.jsonl")
    touch(tmp_path, "README.md", content=configs(card))
    assert found(tmp_path) == expected


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        (configs("- data_files: none-*"), r"README\.md names none-\*; found no such file"),
        (configs("- data_files: a.csv"), r"names a\.csv; found a\.csv, expected files that end in"),
        (configs("- data_files: 3"), r"found data_files 3 for default; expected globs"),
        (configs("  en: x"), r"expected a list of mappings with config_name"),
        ("---\nconfigs: [\n---\n", r"README\.md: the data card at its top is not YAML"),
        (configs("- data_files:\n    validation: a.jsonl"), "only validation files"),
    ],
)
def test_a_card_that_does_not_fit_is_named(tmp_path, readme, said):
    touch(tmp_path, "a.jsonl", "a.csv")
    touch(tmp_path, "README.md", content=readme)
    with pytest.raises(DataError, match=said):
        find(tmp_path)


@pytest.mark.parametrize(
    "readme", ["# Text\n---\nconfigs: 3\n---\n", "---\n- a list\n---\n", "---\nlicense: mit\n---\n"]
)
def test_a_readme_without_configurations_says_nothing(tmp_path, readme):
    touch(tmp_path, "a.jsonl")
    touch(tmp_path, "README.md", content=readme)
    assert found(tmp_path) == {"a.jsonl": None}
    with pytest.raises(DataError, match="expected the flag left out"):
        find(tmp_path, "en")


@pytest.mark.parametrize(
    ("glob", "path", "fits"),
    [
        ("data/*", "data/a.b", True),
        ("data/*", "data2/a", False),
        ("data/*", "data/deep/a", False),
        ("data/", "data/deep/a", True),
        ("data", "data2/a", False),
        ("*.json", "deep/a.json", False),
        ("**/*.json", "a.json", True),
        ("**/*.json", "x/y/a.json", True),
        ("**", "x/y", True),
        ("a?c[0-9]", "abc5", True),
        ("a[!b]c", "abc", False),
        ("a.c", "abc", False),
    ],
)
def test_globs_mean_what_they_mean_on_the_hub(glob, path, fits):
    assert bool(glob_pattern(glob).fullmatch(path)) == fits


def test_s3_is_listed_as_a_folder_is(tmp_path, s3_server):
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    for path in (path for path in c4(tmp_path).rglob("*") if path.is_file()):
        client.put_object(Bucket=BUCKET, Key=f"c4/{path.relative_to(tmp_path)}", Body=path.read_bytes())
    assert found(f"s3://{BUCKET}/c4", "en") == found(f"s3://{BUCKET}/c4/"[:-1], "en") == found(tmp_path, "en")
    assert [file.location for file in find(f"s3://{BUCKET}/c4/", "en")] == [
        file.location for file in find(f"s3://{BUCKET}/c4", "en")
    ]
    one = f"s3://{BUCKET}/c4/en/c4-train.00000-of-00002.json.gz"
    (file,) = find(one)
    assert (file.location, file.split) == (one, None)
    (document,) = read_documents(file, columns=("text",), part=WHOLE, skip=0)
    assert json.loads(document.content)["text"] == "en train.00000-of-00002"
    with pytest.raises(DataError, match=r"--dataset=s3://.*found nothing; expected files that end in"):
        find(f"s3://{BUCKET}/nothing")
    with pytest.raises(DataError, match=r"--dataset=s3://no-such-bucket/x: .*no such object or bucket"):
        find("s3://no-such-bucket/x")


def test_a_name_that_is_nothing_here_is_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"--dataset=text/none: no file or folder here has this name.*HF_HUB_OFFLINE"):
        find_files("text/none", dataset_config_name=None, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"--dataset=\.\./none: found nothing there"):
        find_files("../none", dataset_config_name=None, cache_dir=tmp_path / "cache")
