"""The catalog's rows and the names drivers give."""

import re

import pytest

from hypershard.catalog.gpus import gpu_by_device_name, gpus


@pytest.mark.parametrize(
    ("device_name", "gpu", "bf16_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 NVL", "H100 NVL", 835),
        ("NVIDIA H200", "H200 SXM", 989),
        ("NVIDIA H200 NVL", "H200 NVL", 835),
        ("NVIDIA GH200 480GB", "GH200", 989),
        ("NVIDIA H20", "H20", 148),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB", 312),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB", 312),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB", 312),
        ("A100-SXM4-40GB", "A100 40 GB", 312),
        ("NVIDIA A10G", "A10G", 70),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA B300 SXM6 AC", "B300", 2250),
        ("Tesla V100-SXM2-16GB", "V100 16 GB", None),
        ("Tesla V100-SXM2-32GB", "V100 32 GB", None),
        ("Tesla T4", "T4", None),
    ],
)
def test_the_drivers_name_finds_its_row(device_name: str, gpu: str, bf16_tflops: float | None) -> None:
    found = gpu_by_device_name(device_name)
    assert found is not None
    assert (found.name, found.bf16_tflops) == (gpu, bf16_tflops)


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_what_the_catalog_does_not_have_is_not_guessed(device_name: str) -> None:
    assert gpu_by_device_name(device_name) is None


def test_rows_are_whole() -> None:
    rows = gpus()
    assert len({row.name for row in rows}) == len(rows) >= 15
    for row in rows:
        assert row.source
        assert re.fullmatch(r"20\d\d-\d\d", row.date)
        assert row.memory_gib > 0
        assert row.memory_tb_per_second > 0
        assert (row.bf16_tflops or row.fp16_tflops or 0) > 0
        if row.fp8_tflops and row.bf16_tflops:  # a sparse figure beside a dense one would show here
            assert row.fp8_tflops == pytest.approx(2 * row.bf16_tflops, rel=0.02)
