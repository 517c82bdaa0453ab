"""How much host memory weights take on their way in and out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.host_memory import MAX_SHARD_BYTES, MIB, SHAPES, SMALL, WHOLE_BYTES, value_of
from tiny import disk

from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.snapshot import take_snapshot

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Threads' stacks and what the allocator keeps in pieces.
SLACK_BYTES = 16 * MIB


def measured(*words: str | Path) -> dict[str, int]:
    done = subprocess.run(
        (sys.executable, "-m", "tests.checkpoint.host_memory", *map(str, words)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_rank_that_reads_weights_holds_its_share_and_some_blocks(tmp_path: Path) -> None:
    """Of three ranks; at most nine blocks of 16 MiB are read or waited for, whatever the tensors' sizes."""
    places = {}
    names = list(SHAPES)
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: value_of(name) for name in names[number::3]}, tmp_path / file)
        places |= dict.fromkeys(names[number::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = measured("in", tmp_path)
    print(f"\nof {WHOLE_BYTES / MIB:.0f} MiB a share of {found['share'] / MIB:.0f}: {found['grown'] / MIB:.0f} at most")
    assert found["share"] * 3 == pytest.approx(WHOLE_BYTES, rel=1e-3)  # not all divide
    assert found["share"] <= found["grown"] <= found["share"] + 9 * 16 * MIB + SLACK_BYTES


def test_an_export_holds_one_file_and_what_it_reads_of_it(tmp_path: Path) -> None:
    """Four blocks of 32 MiB, which are compared with their sums, and three copies of a box, whatever the model's size:
    as it lies in blocks, as a stream, and as a tensor."""
    tensors = {f"model/layers.{i}.weight": torch.full(SMALL, float(i)) for i in range(20)}
    whole_bytes, box_bytes = 20 * 16 * MIB, 16 * MIB
    disk(tmp_path / "run").save(1, take_snapshot(tensors), {}, Lineage(1, "first"))
    found = measured("out", tmp_path / "run", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    print(f"\nof {whole_bytes / MIB:.0f} MiB in {len(files)} files: {found['grown'] / MIB:.0f} MiB at most")
    assert len(files) == 10 and sum(file.stat().st_size for file in files) > whole_bytes
    allowed = MAX_SHARD_BYTES + 4 * 32 * MIB + 3 * box_bytes + SLACK_BYTES
    assert MAX_SHARD_BYTES < found["grown"] <= allowed < whole_bytes
