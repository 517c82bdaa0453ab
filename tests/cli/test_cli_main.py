"""The command line answers without torch, and says what went wrong in one line."""

import subprocess
import sys

import pytest

from hypershard.cli.main import VERBS, main
from hypershard.config.schema import SETTINGS

HEAVY = "{'torch', 'transformers', 'tokenizers', 'numpy', 'rich'}"


def run_without_torch(*words: str) -> str:
    """Run the command line in a fresh interpreter; fail if it imported anything heavy."""
    code = (
        "import sys; from hypershard.cli.main import main\n"
        f"try:\n code = main({list(words)!r})\nexcept SystemExit as end:\n code = end.code\n"
        f"assert not code, code\nassert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_lists_the_verbs() -> None:
    shown = run_without_torch("--help")
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_without_torch(verb: str) -> None:
    assert f"usage: hypershard {verb}" in run_without_torch(verb, "--help")


def test_train_help_has_every_setting_with_its_default_and_unit() -> None:
    shown = " ".join(run_without_torch("train", "--help").split())
    for name, (_, field) in SETTINGS.items():
        assert f"--{name} " in shown
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"default: {field.default}" in shown
    assert "(default: 256, tokens)" in shown
    assert "--nproc_per_node" in shown and "examples:" in shown


def test_show_config_names_every_source() -> None:
    shown = run_without_torch("train", "--model", "tiny_llama", "--lr", "0.5", "--min_lr", "0.1", "--show_config")
    rows = [line.split(maxsplit=2) for line in shown.splitlines() if line.startswith("  ")]
    assert {row[0] for row in rows} == set(SETTINGS)
    assert ["lr", "0.5", "flag"] in rows


def test_mistakes_end_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["report", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing" in error
