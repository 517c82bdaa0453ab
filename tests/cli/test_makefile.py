"""`make p5-train` and its like: every family of the catalog, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hypershard.catalog.instances import families, instance

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    program = f"HYPERSHARD={sys.executable} -m hypershard.cli.main"
    # Started by `make test`, an inner make would say which folder it enters and leaves.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", program, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("family", families())
def test_every_family_has_its_target(family: str) -> None:
    flags = "FLAGS=--lr 2e-4 --activation_checkpointing=1"
    done = make(f"{family}-train", "LAUNCH=slurm", "MODEL=llama3_8b", "NODES=3", "DRY_RUN=1", flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash")  # what is printed can be kept as a file
    assert f"# Train llama3_8b on 3 x {instance(family).name}." in done.stdout
    assert "2e-4" in done.stdout


def test_a_recipe_goes_in_place_of_a_model() -> None:
    done = make("p4d-train", "LAUNCH=slurm", "RECIPE=deepseek_r1_qwen_32b_qlora", "DRY_RUN=1", "FLAGS=--dataset /fsx/a")
    assert done.returncode == 0, done.stderr
    assert "    recipes/deepseek_r1_qwen_32b_qlora.yaml\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["p9-train", "LAUNCH=slurm", "MODEL=llama3_8b", "DRY_RUN=1"], ", ".join(families())),
        (["p3-train", "LAUNCH=slurm", "MODEL=llama3_8b", "DRY_RUN=1"], "bfloat16"),
        (["p5-train", "LAUNCH=slurm"], "set MODEL"),
        (["p5-train", "LAUNCH=", "MODEL=llama3_8b"], "set LAUNCH=sagemaker"),
    ],
)
def test_what_is_missing_or_unknown_is_said(words: list[str], said: str) -> None:
    done = make(*words)
    assert done.returncode == 2
    assert said in done.stderr
