"""Claims of speed: tokens per second, MFU and hours against the hardware's peak and against each other."""

from __future__ import annotations

from ...catalog.gpus import Gpu
from ...units import format_count
from .findings import Claims, Finding, Verdict

# MFU that MosaicML's llm-foundry publishes for bf16: from 29% (3B, sequences of 32,768, H100) to 64% (7B, 2,048, A100).
# Half of the lowest and a little over the highest are this project's bounds of what is believable; fp8 goes beyond,
# and offload, slow networks or very small models stay below.
LOWEST_MFU, HIGHEST_MFU = 0.15, 0.70
# Rounded numbers of one run differ by so much.
_SAME_SPEED = 0.10
# Start, saves and validation come on top of the steps.
_MOST_OVERHEAD = 0.30


def speed_findings(claims: Claims) -> list[Finding]:
    """Findings on `mfu`, `tokens_per_second` and `hours`, as far as the claims tell enough."""
    return [*_mfu(claims), *_hours_at_rate(claims), *_hours_at_peak(claims)]


def _peak_flops(gpu: Gpu) -> float | None:
    tflops = gpu.bf16_tflops or gpu.fp16_tflops
    return None if tflops is None else tflops * 1e12


def _mfu(claims: Claims) -> list[Finding]:
    found = []
    if claims.mfu is not None and claims.mfu > 1:
        why = "a share of the peak: 40% is 0.4"
        found.append(
            Finding(claim="mfu", verdict=Verdict.IMPOSSIBLE, found=f"{claims.mfu:g}", expected="at most 1", why=why)
        )
    hardware, flops = claims.gpus(), claims.flops_per_token()
    if hardware is None or flops is None or claims.tokens_per_second is None:
        return found
    gpu, num_gpus = hardware
    peak = _peak_flops(gpu)
    if peak is None:
        return found
    low, high = (claims.tokens_per_second * one / (num_gpus * peak) for one in flops)
    rate = f"{claims.tokens_per_second:,.0f} tokens/s"
    about = f"{num_gpus} x {gpu.name} at {peak / 1e12:g} TFLOP/s, {flops[0] / 1e9:.2f} GFLOP per token or more"
    if claims.mfu is None:
        return [*found, _believable("tokens_per_second", (low, high), found=rate, why=about)]
    mfu = claims.mfu
    if low * (1 - _SAME_SPEED) <= mfu <= high * (1 + _SAME_SPEED):
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.IMPOSSIBLE
        fp8 = gpu.fp8_tflops and peak / (gpu.fp8_tflops * 1e12)
        if fp8 and low * fp8 * (1 - _SAME_SPEED) <= mfu <= high * fp8 * (1 + _SAME_SPEED):
            about += f"; the claim fits the fp8 peak of {gpu.fp8_tflops:g} TFLOP/s, the wrong one for bf16"
    slow, fast = (mfu * num_gpus * peak / one for one in reversed(flops))
    return [
        *found,
        Finding(
            claim="mfu",
            verdict=verdict,
            found=f"{mfu:.1%} and {rate}",
            expected=f"{_range(low, high, '{:.1%}')} at that rate, or {_range(slow, fast, '{:,.0f}')} tokens/s",
            why=about,
        ),
    ]


def _hours_at_rate(claims: Claims) -> list[Finding]:
    if claims.hours is None or claims.num_tokens is None or claims.tokens_per_second is None:
        return []
    hours = claims.num_tokens / claims.tokens_per_second / 3600
    if claims.hours < hours * (1 - _SAME_SPEED):
        verdict = Verdict.IMPOSSIBLE
    else:
        verdict = Verdict.HOLDS if claims.hours <= hours * (1 + _MOST_OVERHEAD) else Verdict.DISAGREES
    return [
        Finding(
            claim="hours",
            verdict=verdict,
            found=f"{claims.hours:,.1f} h",
            expected=f"{hours:,.1f} h, and start, saves and validation",
            why=f"{format_count(claims.num_tokens)} tokens at {claims.tokens_per_second:,.0f} tokens/s",
        )
    ]


def _hours_at_peak(claims: Claims) -> list[Finding]:
    """Hours and tokens tell a rate; whether these GPUs can have it."""
    hardware, flops = claims.gpus(), claims.flops_per_token()
    if hardware is None or flops is None or claims.hours is None or claims.num_tokens is None:
        return []
    gpu, num_gpus = hardware
    peak = _peak_flops(gpu)
    if peak is None or claims.tokens_per_second is not None:
        return []
    at_peak = [claims.num_tokens * one / (num_gpus * peak) / 3600 for one in flops]
    why = (
        f"{format_count(claims.num_tokens)} tokens on {num_gpus} x {gpu.name}; {LOWEST_MFU:.0%} to {HIGHEST_MFU:.0%} "
        f"of the peak take {at_peak[0] / HIGHEST_MFU:,.1f} to {at_peak[1] / LOWEST_MFU:,.1f} h"
    )
    shares = (at_peak[0] / claims.hours, at_peak[1] / claims.hours)
    return [_believable("hours", shares, found=f"{claims.hours:,.1f} h", why=why)]


def _believable(claim: str, shares: tuple[float, float], *, found: str, why: str) -> Finding:
    """Whether the share of the peak that a claim comes to, by the lowest and highest count, is one that runs have."""
    low, high = shares
    if low > 1:
        verdict = Verdict.IMPOSSIBLE
    else:
        verdict = Verdict.HOLDS if low <= HIGHEST_MFU and high >= LOWEST_MFU else Verdict.DISAGREES
    return Finding(
        claim=claim,
        verdict=verdict,
        found=f"{found}, which is {_range(low, high, '{:.1%}')} of the peak",
        expected=f"{LOWEST_MFU:.0%} to {HIGHEST_MFU:.0%}, as bf16 runs have",
        why=why,
    )


def _range(low: float, high: float, form: str) -> str:
    texts = form.format(low), form.format(high)
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
