"""`hypershard launch` and `doctor`: the verbs find their launcher, and need no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypershard.cli import launch
from hypershard.cli.plan import plan_of
from hypershard.errors import ConfigError
from hypershard.launch.slurm_files import PLANS


def run_without_torch(folder: Path, verb: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a verb in a Python where `import torch` fails, as on a login node."""
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('no torch on this login node')\n")
    code = f"import sys; from hypershard.cli.{verb} import run; sys.exit(run({list(words)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_help_lists_the_launchers_and_imports_none(tmp_path: Path) -> None:
    code, shown = run_without_torch(tmp_path, "launch", "--help")
    assert code == 0
    assert shown.startswith("usage: hypershard launch")
    assert all(f"\n  {verb} " in shown for verb in launch.VERBS)


@pytest.mark.parametrize("verb", launch.VERBS)
def test_every_launcher_teaches_without_torch(verb: str, tmp_path: Path) -> None:
    code, shown = run_without_torch(tmp_path, "launch", verb, "--help")
    assert code == 0
    assert shown.startswith(f"usage: hypershard launch {verb}")


def test_a_dry_run_needs_no_torch_and_passes_flags_of_training_on(tmp_path: Path) -> None:
    words = [
        "slurm",
        "--model",
        "llama3_8b",
        "--instance",
        "p5",
        "--nodes",
        "4",
        "--dry_run",
        "--train_batch_size",
        "2",
        "--activation_checkpointing=1",
    ]
    code, shown = run_without_torch(tmp_path, "launch", *words)
    assert code == 0
    assert "#SBATCH --nodes=4" in shown
    assert "--train_batch_size" in shown


def test_the_doctor_needs_no_torch(tmp_path: Path) -> None:
    code, shown = run_without_torch(tmp_path, "doctor")
    assert code == 1  # torch is installed here, and this one does not start: the doctor says so
    assert "no torch on this login node" in shown
    assert "gpus" in shown
    assert run_without_torch(tmp_path, "doctor", "--help")[0] == 0


def test_unknown_launchers_and_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no such launcher; expected one of slurm, sagemaker"):
        launch.run(["slrum"])
    # The verdict starts no training, so there is nothing a flag it does not know could be for.
    with pytest.raises(ConfigError, match="unknown --lr 1"):
        launch.run(["verdict", str(tmp_path), "--lr", "1"])
    assert launch.run([]) == 2


def test_what_does_not_fit_is_refused_and_what_is_said_makes_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", "--model", "llama3_8b", "--instance", "g5", "--dry_run"]
    with pytest.raises(ConfigError, match=r"does not fit: of a GPU's memory .* most of it activations") as refusal:
        launch.run(words)
    told = re.search(r"it fits with (--[^,;]*?)[,.;]", str(refusal.value))
    assert told is not None, refusal.value
    assert launch.run([*words, *told.group(1).split()]) == 0
    assert launch.run([*words, "--force"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("#SBATCH --nodes=") == 2 and " --force" in shown
    for launcher, more in {"sagemaker": ["--role=arn"], "kubernetes": ["--run_dir=/fsx/run"]}.items():
        with pytest.raises(ConfigError, match="does not fit"):
            launch.run([launcher, *words[1:], *more])


@pytest.mark.parametrize("model", sorted(PLANS))
def test_the_files_of_slurm_ask_for_nodes_that_suffice(model: str) -> None:
    asked = PLANS[model]
    made = plan_of([f"--model={model}", f"--instance={asked.instance}", f"--nodes={asked.num_nodes}", *asked.flags])
    assert made.memory.verdict == "fits"
