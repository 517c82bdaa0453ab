from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypershard.checkpoint.local import LocalTier
from hypershard.checkpoint.manager import CheckpointManager
from hypershard.cli.main import main
from hypershard.config.schema import ModelConfig
from hypershard.models.family import family_of


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 and 20 of a tiny model, and an unfinished one of step 30."""
    family = family_of("llama_v3")
    model = family.complete(
        ModelConfig(
            hidden_width=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=5000, max_context_width=16
        )
    )
    manager = CheckpointManager(LocalTier(tmp_path / "run" / "checkpoints"), keep=5, asynchronous=False)
    for step in (10, 20):
        tensors = {f"model/{spec.name}": torch.full(spec.shape, step / 100) for spec in family.parameters(model)}
        manager.save(step, tensors, {"model": dataclasses.asdict(model)})
    (tmp_path / "run" / "checkpoints" / "step-00000030").mkdir()
    return tmp_path / "run"


def test_list_shows_every_checkpoint_and_its_state(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000010" / "__0_0.distcp").write_bytes(b"")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    header, newest, whole, damaged = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "saved", "size", "ranks", "torch", "state"]
    assert newest.split()[0] == "30" and "unfinished" in newest
    assert whole.split()[0] == "20" and whole.split()[-1] == "complete" and torch.__version__ in whole
    assert damaged.split()[0] == "10" and "found 0 bytes, expected" in damaged


def test_verify_names_the_damage_and_fails(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": valid") == 2
    path = run_dir / "checkpoints" / "step-00000010" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["checkpoint", "list", str(run_dir)]) == 0, "sizes are right; only reading every byte finds it"
    assert main(["checkpoint", "verify", str(run_dir)]) == 2
    captured = capsys.readouterr()
    assert f"{path}: found checksum" in captured.out and "1 of 2 checkpoints are damaged" in captured.err
    assert main(["checkpoint", "verify", str(run_dir), "--step", "20"]) == 0
    assert main(["checkpoint", "verify", str(path.parent)]) == 2


@pytest.mark.parametrize(("step", "value"), [([], 0.2), (["--step", "10"], 0.1)])
def test_export_loads_in_transformers(run_dir: Path, tmp_path: Path, step: list[str], value: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hypershard.data

    embedded = Path(hypershard.data.__file__).parent / "embedded"
    output = tmp_path / "model"
    flags = ["--output", str(output), "--dtype", "float32", "--tokenizer", str(embedded), *step]
    assert main(["checkpoint", "export", str(run_dir), *flags]) == 0
    weight = AutoModelForCausalLM.from_pretrained(output).model.embed_tokens.weight
    assert torch.equal(weight, torch.full((5000, 16), value))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.decode(tokenizer("for i in range(3):")["input_ids"]) == "for i in range(3):"
    assert tokenizer.eos_token is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{run}", "--step", "15"], "--step=15: .* has steps 20, 10"),
        (["list", "{run}/nothing"], "no such directory"),
        (["verify", "{run}/checkpoints/step-00000030"], "never finished"),
        (["export", "{run}", "--output", "{run}"], "--output=.*exists already"),
    ],
)
def test_mistakes_are_explained(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["checkpoint", *(text.format(run=run_dir) for text in arguments)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_list_needs_no_torch(run_dir: Path) -> None:
    code = (
        "import sys; from hypershard.cli.checkpoint import run; "
        f"run(['list', {str(run_dir)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", "--help"])
    assert stop.value.code == 0
    assert "hypershard checkpoint export runs/demo --output models/demo" in capsys.readouterr().out
