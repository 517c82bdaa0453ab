"""The way of the data, from files to batches, against `datasets` and torch's DataLoader in one run.

prepare: JSONL -> tokens on disk, all cores. bins: batches from token bins. stream: batches from JSONL, tokenised while
training. Each way runs in a process of its own; ways take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_path.loading import BATCH_SIZE, CONTEXT, write_arrow
from data_path.text import write_text
from results_file import save

from hypershard.data.bins.encoding_pool import num_cores

HERE = Path(__file__).parent / "data_path"
PARTS = ("prepare", "bins", "stream")
NUM_FILES = 8  # as many as a batch has sequences, so that every worker of the peer has files of its own
WORKERS = (0, 2)
# (name, columns stored): inputs alone are less work than ours, all three are the same.
ARROW_SETS = (("arrow_inputs", 1), ("arrow_all", 3))
TARGETS = {"prepare": 1.2, "bins_tokens_per_second": 20e6}


def child(script: str, *argv: object, **environment: str) -> dict[str, Any]:
    """The JSON that a script of data_path prints last. Hubs are out of reach; tokenizers' forks need no advice."""
    command = [sys.executable, str(HERE / script), *map(str, argv)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | offline | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare_part(folder: Path, text: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of each way, and how much faster ours is."""
    cores = num_cores()
    methods = ("hypershard", "datasets_transformers", "datasets_tokenizers")
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for number in range(rounds):
        for method in methods if number % 2 == 0 else reversed(methods):
            output = folder / f"{method}{number}"
            # Each process of `map` tokenises alone; the library's own threads would be in each other's way.
            threads = {} if method == "hypershard" else {"TOKENIZERS_PARALLELISM": "false"}
            found[method].append(child("preparing.py", method, text, output, "--num_processes", cores, **threads))
    tokens = {one["tokens"] for results in found.values() for one in results}
    assert len(tokens) == 1, f"the ways made other tokens of the same text: {tokens}"
    (num_tokens,) = tokens
    seconds = {method: [one["seconds"] for one in results] for method, results in found.items()}
    for method in methods[1:]:
        seconds[f"{method}_map_alone"] = [one["map_seconds"] for one in found[method]]
    speeds = {name: _fastest_and_median([num_tokens / one for one in taken]) for name, taken in seconds.items()}
    cpu = {method: [one["cpu_seconds"] for one in results] for method, results in found.items()}
    print("prepare: least CPU seconds", *(f"{method} {min(taken):.1f}" for method, taken in cpu.items()))
    compared = _compared("prepare", speeds, "hypershard")
    return {"num_tokens": num_tokens, "num_processes": cores, "cpu_seconds": cpu, **compared}


def bins_part(folder: Path, bins: Path, options: list[object]) -> dict[str, Any]:
    speeds = {"hypershard": _loaded("hypershard", bins, folder, 0, options)}
    for name, columns in ARROW_SETS:
        (folder / name).mkdir()
        write_arrow(bins, folder / name, columns=columns)
        for workers in WORKERS:
            speeds[f"{name}_{workers}_workers"] = _loaded("arrow", folder / name, folder, workers, options)
    for name in ("litdata", "streaming"):
        if importlib.util.find_spec(name) is None:
            print(f"bins: {name} is not installed and not compared")
    return _compared("bins", speeds, "hypershard")


def stream_part(folder: Path, text: Path, options: list[object]) -> dict[str, Any]:
    found = {}
    for workers in WORKERS:
        speeds = {
            method: _loaded(method, text, folder / "cache", workers, options)
            for method in ("hypershard", "datasets_streaming")
        }
        found[f"{workers}_workers"] = _compared(f"stream, {workers} workers", speeds, "hypershard")
    return found


def _loaded(method: str, data: Path, cache: Path, workers: int, options: list[object]) -> dict[str, float]:
    found = child("loading.py", method, data, cache, "--num_workers", workers, *options)
    if workers == 0:  # else most of the work is not in the process that was asked
        per_cpu = max(found["tokens_per_cpu_second"]) / 1e6
        print(f"{data.name}: {method} without workers: {per_cpu:.3f}M tokens per CPU second at most")
    return _fastest_and_median(found["tokens_per_second"])


def _fastest_and_median(speeds: list[float]) -> dict[str, float]:
    return {"fastest": max(speeds), "median": statistics.median(speeds)}


def _compared(part: str, speeds: dict[str, dict[str, float]], ours: str) -> dict[str, Any]:
    """Print and return tokens per second and the ratio of ours to each other way."""
    ratios = {}
    for name, speed in speeds.items():
        ratios[name] = {kind: speeds[ours][kind] / speed[kind] for kind in ("fastest", "median")}
        print(
            f"{part:18} {name:34} {speed['fastest'] / 1e6:8.3f}M tokens/s, median {speed['median'] / 1e6:8.3f}M; "
            f"ours / this {ratios[name]['fastest']:6.2f}, median {ratios[name]['median']:6.2f}",
            flush=True,
        )
    return {"tokens_per_second": speeds, "ratios": ratios}


def judged(numbers: dict[str, Any]) -> list[str]:
    """Each target and what was reached of it."""
    lines = []
    for method in ("datasets_transformers", "datasets_tokenizers") if "prepare" in numbers else ():
        ratio = numbers["prepare"]["ratios"][method]["median"]
        lines.append(f"prepare: {ratio:.2f} times {method}, target {TARGETS['prepare']}")
    if "bins" in numbers:
        speed = numbers["bins"]["tokens_per_second"]["hypershard"]["median"]
        lines.append(f"bins: {speed / 1e6:.1f}M tokens/s, target {TARGETS['bins_tokens_per_second'] / 1e6:.0f}M")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--megabytes", type=int, default=40, help="of JSONL (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each preparation (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="times each loader is measured (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a window (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for data.json (default: benchmarks/results)")
    args = parser.parse_args()
    options = ["--num_windows", args.windows, "--seconds", args.seconds]
    numbers: dict[str, Any] = {"megabytes": args.megabytes, "context": CONTEXT, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_text(folder / "text", size_bytes=args.megabytes * 10**6, num_files=NUM_FILES)
        if "prepare" in args.parts:
            numbers["prepare"] = prepare_part(folder, text, args.rounds)
        if "bins" in args.parts:
            if "prepare" not in args.parts:
                child("preparing.py", "hypershard", text, folder / "hypershard0", "--num_processes", num_cores())
            numbers["bins"] = bins_part(folder, folder / "hypershard0", options)
        if "stream" in args.parts:
            numbers["stream"] = stream_part(folder, text, options)
    print("\n".join(judged(numbers)))
    print(f"written to {save('data', {**numbers, 'targets': TARGETS}, directory=args.output)}")


if __name__ == "__main__":
    main()
