"""All is gone but the bucket: a new cluster goes on from the URI alone, bit for bit."""

import shutil
from pathlib import Path

import pytest
from tests.conftest import BUCKET
from tests.integration.processes import command, finish, history, start, train_well, wait_for_step
from tests.s3_server import Server

pytestmark = pytest.mark.slow


def test_a_new_cluster_goes_on_from_the_uri(tmp_path: Path, s3_server: Server) -> None:
    uri = f"s3://{BUCKET}/{tmp_path.name}"
    tiers = {"checkpoint_freq": 0, "in_memory_checkpointing_freq": 0, "s3_tier_base_path": uri}
    train_well(run_dir=tmp_path / "whole", nproc_per_node=2, max_steps=60, checkpoint_freq="none")
    lost = tmp_path / "lost"
    process = start(command(run_dir=lost, nproc_per_node=2, max_steps=60, s3_checkpointing_freq=5, **tiers))
    wait_for_step(lost, 40, process)
    process.kill()
    finish(process)
    shutil.rmtree(lost)
    words = [f"--config={uri}/config.yaml", f"--resume_from_checkpoint={uri}", f"--run_dir={tmp_path}/new"]
    words += ["--s3_tier_base_path=none", "--checkpoint_freq=none", "--nproc_per_node=2"]
    code, output = finish(start([*command()[:4], *words]))
    assert code == 0 and f"from {uri}/step-" in output, output
    new = history(tmp_path / "new")
    assert 0 < len(new) < 60 and new == history(tmp_path / "whole")[-len(new) :]
    code, output = finish(start([*command()[:3], "checkpoint", "verify", uri]))
    assert code == 0 and "valid" in output, output
