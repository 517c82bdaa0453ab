import json
from pathlib import Path

import pytest

from hypershard.catalog.gpus import gpu_by_device_name
from hypershard.errors import StorageError
from hypershard.metrics.display import describe
from hypershard.metrics.sinks import JsonLines, drop_after, read_json_lines
from hypershard.metrics.throughput import throughput


def test_mfu_by_hand() -> None:
    # 8.03e9 parameters, 12,412 tokens/s on one H100: 6 * 7.505e9 + 6 * 32 * 4096 * 4096 FLOPs a token
    flops = 6 * 7.505e9 + 6 * 32 * 4096 * 4096
    found = throughput(tokens=12_412 * 8, seconds=1.0, flops_per_token=flops, num_gpus=8, peak_flops_per_gpu=989e12)
    assert found.tokens_per_second == 99_296
    assert found.mfu == pytest.approx(0.6056, abs=1e-3)
    assert throughput(tokens=1, seconds=1.0, flops_per_token=1.0, num_gpus=1, peak_flops_per_gpu=None).mfu is None


def test_the_h100_peak_is_dense() -> None:
    """The wrong peak is a trap: 1,979 is the H100's sparse figure."""
    gpu = gpu_by_device_name("NVIDIA H100 80GB HBM3")
    assert gpu is not None
    assert gpu.bf16_tflops == 989


def test_json_lines_survive_a_torn_end_and_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in range(1, 6):
        sink.write(step, {"loss": step / 3})
    sink.close()
    path.write_text(path.read_text() + '{"step": 6, "los')
    drop_after(path, 3)
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3]
    assert read_json_lines(path)[0]["loss"] == 1 / 3  # floats come back bit for bit
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(StorageError, match="line 2"):
        read_json_lines(path)


def test_a_line_for_people() -> None:
    record = {
        "loss": 5.12341, "grad_norm": 1.2, "lr": 3e-4, "tokens_per_second": 12_300.0, "mfu": 0.412,
        "memory_bytes": 2**30, "step_seconds": 2.0, "data_seconds": 0.0,
    }  # fmt: skip
    line = describe(10, 70, record)
    assert line == "step 10/70  loss 5.1234  norm 1.20  lr 3.0e-04  12.3k tok/s  mfu 41.2%  1.00 GiB  eta 2m00s"
    assert describe(10, 70, {"validation_loss": 4.0}) == "step 10/70  validation loss 4.0000"
    json.dumps(record)
