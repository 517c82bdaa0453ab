"""A run directory as a job and its steps' seconds, wherever the run was made."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.plan_jobs import config_of, job_of

from hypershard.config.sources import to_yaml
from hypershard.data.embedded import VOCAB_SIZE
from hypershard.errors import ConfigError, DataError
from hypershard.plan.calibration.measured_run import _vocabulary_of, job_of_run, measured

EMBEDDED = Path(__file__).parents[2] / "src" / "hypershard" / "data" / "embedded"
ON_A_CLUSTER = {
    "hypershard": "0.1.0",
    "torch": "2.12.1",
    "device": "NVIDIA H100 80GB HBM3",
    "num_cpus": 192,
    "world_size": 16,
    "local_world_size": 8,
}


def write_run(run_dir: Path, *, environment: dict[str, Any], **flags: Any) -> None:
    """A run of 12 steps that was started again after step 8, as `hypershard train` leaves it."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config_of("llama3_8b", **flags)))
    (run_dir / "environment.json").write_text(json.dumps(environment))
    records = [
        {"step": step, "loss": 2.0, "step_seconds": float(step), "memory_bytes": 1000 + step} for step in range(1, 13)
    ]
    records.insert(10, {"step": 10, "validation_loss": 2.0, "tokens": 1})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [("started", 0), ("saved", 8), ("started", 8), ("saved", 12), ("stopped", 12), ("started", 12)]
    lines = [json.dumps({"event": kind, "step": step, "at": 1.0}) + "\n" for kind, step in events]
    (run_dir / "events.jsonl").write_text("".join(lines))


def test_a_run_of_a_cluster_is_the_job_it_was(tmp_path: Path) -> None:
    write_run(tmp_path / "run", environment=ON_A_CLUSTER, train_batch_size=2)
    found, wanted = job_of_run(tmp_path / "run", told={}), job_of("llama3_8b", "p5", 2, train_batch_size=2)
    assert (found.model, found.data, found.parallel) == (wanted.model, wanted.data, wanted.parallel)
    assert (found.num_nodes, found.num_gpus, found.instance.gpu) == (2, 16, wanted.instance.gpu)
    assert found.attention_path == wanted.attention_path == "varlen"
    (tmp_path / "run" / "plan.json").write_text(json.dumps({"job": {"instance": "p5.48xlarge"}}))
    assert job_of_run(tmp_path / "run", told={}) == wanted


def test_the_steps_are_those_of_the_last_start_that_made_any(tmp_path: Path) -> None:
    write_run(tmp_path / "run", environment=ON_A_CLUSTER)
    found = measured(tmp_path / "run")
    assert (found.run, found.step_seconds, found.memory_bytes) == ("run", (9.0, 10.0, 11.0, 12.0), 1012.0)
    assert found.software == "torch 2.12.1, hypershard 0.1.0"


def test_a_cpu_has_the_cores_that_the_run_had(tmp_path: Path) -> None:
    for cores in (4, 8):
        environment = {**ON_A_CLUSTER, "device": "CPU", "num_cpus": cores, "world_size": 2, "local_world_size": 2}
        write_run(tmp_path / f"{cores}", environment=environment)
    few, many = (job_of_run(tmp_path / f"{cores}", told={}) for cores in (4, 8))
    assert not few.has_gpus and few.num_gpus == 2 and few.instance.num_vcpus == 4
    assert few.instance.gpu.bf16_tflops is not None
    assert many.instance.gpu.bf16_tflops == pytest.approx(2 * few.instance.gpu.bf16_tflops)


def test_the_vocabulary_is_read_from_the_run_or_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, environment=ON_A_CLUSTER, dataset="somewhere")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("vocab_size: 128256", "vocab_size: null"))
    with pytest.raises(ConfigError, match="give --vocab_size"):
        job_of_run(run_dir, told={})
    assert job_of_run(run_dir, told={"vocab_size": "5000"}).model.vocab_size == 5000
    (run_dir / "tokenizer").mkdir()
    tokenizer = {"model": {"vocab": [["a", 0.0], ["b", 0.0]]}, "added_tokens": [{"id": 6}]}
    (run_dir / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert job_of_run(run_dir, told={}).model.vocab_size == 7
    (run_dir / "plan.json").write_text(json.dumps({"model": {"vocab_size": 9}}))
    assert job_of_run(run_dir, told={}).model.vocab_size == 9
    assert _vocabulary_of(json.loads((EMBEDDED / "tokenizer.json").read_text())) == VOCAB_SIZE


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml is missing"):
        job_of_run(tmp_path, told={})
    write_run(tmp_path / "run", environment={"torch": "2.13.0"})
    with pytest.raises(DataError, match="has no device, hypershard"):
        job_of_run(tmp_path / "run", told={})
    write_run(tmp_path / "odd", environment={**ON_A_CLUSTER, "world_size": 12})
    with pytest.raises(ConfigError, match="12 ranks do not make whole nodes of 8"):
        job_of_run(tmp_path / "odd", told={})
