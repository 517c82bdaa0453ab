"""NF4 against bitsandbytes, against theory, and against itself in parts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hypershard.adapters import nf4
from hypershard.adapters.nf4 import LEVELS, Quantised, dequantise, quantise, unpack_scales
from hypershard.adapters.nf4_format import BLOCK, GROUP, Format


def a_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights with a block of zeros, and values at and between levels in its first rows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    rows = weight.view(-1, shape[-1])
    borders = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    rows[0, :BLOCK] = 0.0
    rows[1, : len(LEVELS)] = torch.tensor(LEVELS) * 0.1
    rows[2, : len(LEVELS)] = torch.tensor([*borders, 1.0])
    return weight.to(dtype)


def test_bits_are_those_bitsandbytes_gave() -> None:
    """Taken from bitsandbytes 0.50.2, for where it is not installed."""
    weight = (torch.arange(2 * BLOCK) * 37 % 101 - 50).float().mul(0.0137).view(2, BLOCK)
    weight[1] *= 0.3
    found = quantise(weight, double_quant=False)
    assert found.codes.flatten().numpy().tobytes().hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
        "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
    )
    assert found.scales.view(torch.float32).flatten().tolist() == [0.6850000023841858, 0.20550000667572021]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 512), (3, 40, 192)])
def test_bits_are_those_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = a_weight(*shape, dtype=dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    found = quantise(weight, double_quant=False)
    layout = Format(shape, False)
    assert torch.equal(found.codes.flatten(), codes.flatten())
    assert torch.equal(unpack_scales(found.scales, layout).flatten(), state.absmax)
    assert torch.equal(quantise(weight, double_quant=True).codes, found.codes)
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantise(found, layout, dtype=dtype), expected.view(-1, shape[-1]))


def test_a_row_that_ends_within_a_block_is_bitsandbytes_shorter_last_block() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = a_weight(3, 3 * BLOCK + 36)
    found = quantise(weight, double_quant=False)
    back = dequantise(found, Format(tuple(weight.shape), False), dtype=torch.float32)
    for row in range(len(weight)):
        codes, state = functional.quantize_4bit(weight[row], blocksize=BLOCK, quant_type="nf4")
        assert torch.equal(back[row], functional.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("num_blocks", [1, 7, GROUP, GROUP + 3])
def test_double_quantised_scales_are_within_half_a_step(num_blocks: int) -> None:
    weight = a_weight(5, num_blocks * BLOCK)
    layout = Format(tuple(weight.shape), True)
    found = unpack_scales(quantise(weight, double_quant=True).scales, layout).double().numpy()
    absmax = np.abs(weight.double().numpy().reshape(5, num_blocks, BLOCK)).max(-1)
    assert found.shape == absmax.shape
    for row in range(5):
        for start in range(0, num_blocks, GROUP):
            exact, group = absmax[row, start : start + GROUP], found[row, start : start + GROUP]
            half_step = (exact.max() - exact.min()) / 255 / 2
            rounding = exact.max() * 2.0**-22  # of float32: minimum, step, product and sum
            assert np.abs(group - exact).max() <= half_step + rounding
            assert group.min() == exact.min()  # a row of zeros or equals stays as it is


@pytest.mark.parametrize("shape", [(256, 4096), (512, 192)])
def test_double_quantised_weights_are_no_further_off_than_bitsandbytes_own(shape: tuple[int, ...]) -> None:
    """Whose bytes for scales are others (nf4.py); rows of three blocks have groups of three."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.02
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    assert state.nested
    theirs = functional.dequantize_4bit(codes, state)
    ours = dequantise(quantise(weight, double_quant=True), Format(shape, True), dtype=torch.float32)
    plain = dequantise(quantise(weight, double_quant=False), Format(shape, False), dtype=torch.float32)
    errors = [(one - weight).square().mean().item() for one in (ours, theirs, plain)]
    assert errors[0] <= 1.05 * errors[1] and errors[0] != errors[2] != errors[1]


def test_error_of_normal_weights_is_what_theory_says() -> None:
    """Given a block's absmax m, the other 63 weights are normal, cut off at m; each falls to the nearest level."""
    weight = torch.randn(2048, 512, generator=torch.Generator().manual_seed(4))
    layout = Format(tuple(weight.shape), False)
    found = (dequantise(quantise(weight, double_quant=False), layout, dtype=torch.float32) - weight).square().mean()

    levels = np.array(LEVELS)
    expected = total = 0.0
    for m in np.arange(1.0, 6.0, 0.02):
        inside = math.erf(m / math.sqrt(2))  # the share of a normal within [-m, m]
        density = BLOCK * inside ** (BLOCK - 1) * 2 * math.exp(-(m**2) / 2)
        x = np.linspace(-m, m, 2001)
        error = np.abs(x[:, None] - m * levels).min(-1) ** 2
        normal = np.exp(-(x**2) / 2)
        expected += density * (error * normal).sum() / normal.sum()
        total += density
    expected *= (BLOCK - 1) / BLOCK / total
    assert found.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("double_quant", [False, True])
def test_any_cut_between_rows_gives_the_bits_of_the_whole(double_quant: bool) -> None:
    weight = a_weight(2**16 + 77, 2 * BLOCK, dtype=torch.bfloat16)  # more than is worked on at a time
    layout = Format(tuple(weight.shape), double_quant)
    whole = quantise(weight, double_quant=double_quant)
    back = dequantise(whole, layout, dtype=torch.bfloat16)
    for start, stop in ((0, 1), (1, 30), (2**16 - 20, 2**16 + 77)):
        part = quantise(weight[start:stop], double_quant=double_quant)
        assert torch.equal(part.codes, whole.codes[start:stop])
        assert torch.equal(part.scales, whole.scales[start:stop])
        assert torch.equal(dequantise(part, layout, dtype=torch.bfloat16), back[start:stop])


@pytest.mark.parametrize(
    ("shape", "double_quant", "bytes_per_weight"),
    [
        ((64, 4096), True, 0.5 + 1 / 64 + 8 / 4096),
        ((64, 14336), True, 0.5 + 1 / 64 + 8 / 14336),
        ((2, 16, 32768), True, 0.5 + 1 / 64 + 2 * 8 / 32768),  # two groups of 256 scales to a row
        ((64, 4096), False, 0.5 + 4 / 64),
    ],
)
def test_bytes_per_weight(shape: tuple[int, ...], double_quant: bool, bytes_per_weight: float) -> None:
    found: Quantised = quantise(torch.ones(shape), double_quant=double_quant)
    held = found.codes.untyped_storage().nbytes() + found.scales.untyped_storage().nbytes()
    assert held == Format(shape, double_quant).num_bytes
    assert held / math.prod(shape) == pytest.approx(bytes_per_weight, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_bits_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dequantisation is one kernel, which stays so in a process: hence the monkeypatch, which undoes it."""
    weight = a_weight(256, 4096, dtype=torch.bfloat16)
    layout = Format(tuple(weight.shape), True)
    host, device = quantise(weight, double_quant=True), quantise(weight.cuda(), double_quant=True)
    assert torch.equal(device.codes.cpu(), host.codes)
    assert torch.equal(device.scales.cpu(), host.scales)
    expected = dequantise(host, layout, dtype=torch.bfloat16)
    assert torch.equal(dequantise(device, layout, dtype=torch.bfloat16).cpu(), expected)
    monkeypatch.setattr(nf4, "_fused", None)
    nf4.fuse_dequantisation()
    assert torch.equal(dequantise(device, layout, dtype=torch.bfloat16).cpu(), expected)
