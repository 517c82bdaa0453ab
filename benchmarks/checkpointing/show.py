"""The benchmark's numbers as tables: medians, and the smallest and largest of all rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

from .slowdown import OFF
from .stall import MEMORY

TARGET = 1.2  # of the memory tier's stall, in plain copies of the same bytes
MB = 1e6  # as disks, networks and the peers' figures count


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Median (smallest to largest)."""
    texts = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def print_stalls(found: Mapping[str, Any]) -> None:
    size, ranks = found["state_bytes"], found["num_ranks"]
    print(f"\n{size / 1e9:.2f} GB in {found['num_tensors']} tensors over {ranks} ranks")
    print("Stall of a save in seconds and in plain copies of the same bytes made just before: median (least to most)\n")
    print(f"{'method':<48} {'stall':<24} {'in plain copies':<22} {'settles':>8} {'written':>8} {'first':>7}")
    for name, method in found["methods"].items():
        _, blocked, settles, written = zip(*method["rounds"], strict=True)
        print(
            f"{name:<48} {spread(blocked):<24} {spread(ratios_of(method), '{:.2f}'):<22} "
            f"{statistics.median(settles):>8.3f} {statistics.median(written):>8.3f} {method['first'][1]:>7.3f}"
        )
    for name, reason in found["missing"].items():
        print(f"{name:<48} not measured: {reason}")
    parts = ", ".join(
        f"{name} {statistics.median(took) * 1000:.2f} ms" for name, took in found["parts_of_a_save"].items()
    )
    print(f"\nof the memory tier's stall, beside the copy: {parts}")
    memory = found["methods"][MEMORY]
    ratio = statistics.median(ratios_of(memory))
    fastest = min(row[1] for row in memory["rounds"]) / min(row[0] for row in memory["rounds"])
    print(
        f"memory tier: {ratio:.2f} plain copies (fastest save to fastest copy {fastest:.2f}), target at most {TARGET}: "
        f"{'met' if ratio <= TARGET else 'missed'}"
    )
    for name, seconds in (found["stream_seconds"] or {}).items():
        print(f"training stream, {name}: {spread(seconds)} s")


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Per method median, least and most of its stall in seconds and in plain copies; whether the target is met."""

    def three(values: Sequence[float]) -> list[float]:
        return [statistics.median(values), min(values), max(values)]

    methods = {
        name: {
            "stall_seconds": three([row[1] for row in method["rounds"]]),
            "plain_copies": three(ratios_of(method)),
        }
        for name, method in found["methods"].items()
    }
    is_met = methods[MEMORY]["plain_copies"][0] <= TARGET
    return {"methods": methods, "target_plain_copies": TARGET, "is_met": is_met}


def ratios_of(method: Mapping[str, Any]) -> list[float]:
    """Per round its stall in plain copies."""
    return [row[1] / row[0] for row in method["rounds"]]


def rows(pairs: Sequence[tuple[str, Sequence[float], str, Sequence[float]]], size: int) -> None:
    """Lines of MB/s and of the ratio to a raw way of moving as many bytes, round by round."""
    print(f"{'':<30} {'MB/s':<26} {'beside':<22} {'MB/s':<26} {'ratio'}")
    for name, seconds, raw_name, raw in pairs:
        ratios = [theirs / ours for ours, theirs in zip(seconds, raw, strict=True)]
        own, other = ([size / MB / took for took in times] for times in (seconds, raw))
        print(
            f"{name:<30} {spread(own, '{:,.0f}'):<26} {raw_name:<22} {spread(other, '{:,.0f}'):<26} "
            f"{spread(ratios, '{:.2f}')}"
        )


def print_tiers(saved: Mapping[str, Any], loads: Mapping[int, Any]) -> None:
    seconds, size = saved["save"]["seconds"], saved["state_bytes"]
    memory = list(map(add, seconds["memory: copied"], seconds["memory: summed up"]))
    print("\nSaving, all ranks at once\n")
    pairs = [("memory (copied, summed up)", memory, "copy", seconds["copy"])]
    pairs += [(name, seconds[name], "cp + fsync", seconds["cp + fsync"]) for name in ("local disk", "shared disk")]
    if "S3" in seconds:
        pairs.append(("S3 (moto on loopback)", seconds["S3"], "boto3 upload_file", seconds["boto3 upload_file"]))
    rows(pairs, size)
    for count, found in loads.items():
        seconds = found["load"]["seconds"]
        print(f"\nRestoring what {saved['num_ranks']} ranks saved on {count}; dcp.load checks no byte, the tiers all\n")
        pairs = [("memory", seconds["memory"], "copy", seconds["copy"])]
        pairs += [(name, seconds[name], "read", seconds["read"]) for name in ("local disk", "shared disk", "dcp.load")]
        if "S3" in seconds:
            pairs.append(
                ("S3 (moto on loopback)", seconds["S3"], "boto3 download_file", seconds["boto3 download_file"])
            )
        rows(pairs, size)
        dcp = statistics.median(seconds["dcp.load"])
        for name, took, _, _ in pairs:
            print(f"{name:<30} {spread(took)} s, {statistics.median(took) / dcp:.2f} of dcp.load's")


def print_slowdown(found: Mapping[str, Any]) -> None:
    seconds = found["seconds"]
    off = statistics.median(seconds[OFF])
    state = f"{found['state_bytes'] / MB:.0f} MB of state"
    print(f"\nTraining {found['steps']} steps of the {found['scale']} model ({state}), {len(seconds[OFF])} rounds\n")
    for name, totals in seconds.items():
        paired = [total / without for total, without in zip(totals, seconds[OFF], strict=True)]
        stall = max(found["longest_stall"][name], default=0.0)
        print(
            f"memory tier {name:<10} {spread(totals)} s, {statistics.median(totals) / off:.4f} of off "
            f"(rounds {min(paired):.3f} to {max(paired):.3f}), longest stall {stall * 1000:.1f} ms"
        )


def print_peer(found: Mapping[str, Any]) -> None:
    seconds, size = found["seconds"], found["size_bytes"]
    print(f"\nA copy of {size / MB:.0f} MB in another node's memory ({found['nodes']})\n")
    rows(
        [
            ("copy, checked there", seconds["copy"], "socket", seconds["socket"]),
            ("read back, checked here", seconds["copy back"], "socket", seconds["socket back"]),
        ],
        size,
    )
