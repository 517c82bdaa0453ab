"""What saving costs and how fast restoring is, on real ranks: every tier beside the plainest way to move the bytes.

One run, one state (a Llama sharded by FSDP2 with AdamW's moments), every method in turn, round after round, so that a
machine whose speed drifts drifts for all. Medians, smallest and largest are printed; every round is in the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = 1.2  # of the memory tier's stall, in plain copies of the same bytes
RANK_SECONDS = 3600  # longer than any part takes; a hang should end
PARTS = ("stall", "tiers", "train", "peer")
PEER_BYTES = {"small": 40 * 10**6, "medium": 600 * 10**6, "1b": 10**9, "8b": 10**9}  # about what a rank saves
MB = 1e6  # as disks, networks and the peers' figures count


# --- one rank ------------------------------------------------------------------------------------------------


def be_a_rank(phase: str, case_file: Path, answer: Path) -> None:
    from checkpointing import slowdown, stall, tiers
    from checkpointing.case import Bench, Case, digest, fill_randomly

    case, bench = Case.read(case_file), Bench()
    if phase == "train":
        found = slowdown.measure(case, bench)
    else:
        job = bench.build(case, case.scale, Path(case.folder) / "unused")
        fill_randomly(job.tensors(), seed=bench.ranks.rank)
        sizes = [part.nbytes for part in stall.take_parts(job)]
        found = {"state_bytes": bench.sum(sum(sizes)), "num_tensors": len(sizes)}
        refuse_too_large(case.memory_dir, case.folder, found["state_bytes"])
        if phase == "stall":
            found |= stall.measure(case, bench, job)
            found["parts_of_a_save"] = stall.parts_of_a_save(bench, job, case.rounds)
        elif phase == "save":
            found["digest"] = digest(bench, job.tensors())
            found["save"] = tiers.measure_saves(case, bench, job)
        else:
            saved = json.loads((answer.parent / f"save-{case.ranks}.json").read_text())
            num_saved, expected = saved["num_ranks"], saved["digest"]
            found["load"] = tiers.measure_loads(case, bench, job, num_saved=num_saved, expected=expected)
    if bench.ranks.is_main:
        answer.write_text(json.dumps({"num_ranks": bench.world.size, **found}))
    import torch.distributed as dist

    dist.destroy_process_group()


def refuse_too_large(memory_dir: str, folder: str, state_bytes: int) -> None:
    """All methods keep their memory until the end, since first use of memory is not what is measured."""
    from hypershard.checkpoint.snapshot import available_memory_bytes
    from hypershard.units import format_bytes

    needed = {
        "host memory": (9 * state_bytes, available_memory_bytes()),
        memory_dir: (5 * state_bytes, shutil.disk_usage(memory_dir).free),
        folder: (5 * state_bytes, shutil.disk_usage(folder).free),
    }
    for where, (wanted, free) in needed.items():
        if wanted > free:
            sys.exit(
                f"found {format_bytes(free)} in {where}, expected {format_bytes(wanted)}: choose a smaller --scale"
            )


# --- the run -------------------------------------------------------------------------------------------------


def run_ranks(phase: str, num_ranks: int, case_file: Path, environment: Mapping[str, str], *, name: str) -> Any:
    answer = case_file.parent / f"{name}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command += [str(HERE / "checkpoint.py"), "--rank_phase", phase, "--case", str(case_file), "--answer", str(answer)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        said, errors = process.communicate(timeout=RANK_SECONDS)
    except BaseException:
        process.terminate()  # unlike SIGKILL this reaches the ranks, which write to what is removed next
        process.wait(timeout=60)
        raise
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{said[-3000:]}{errors[-6000:]}")
    return json.loads(answer.read_text())


@contextlib.contextmanager
def servers(*, with_s3: bool) -> Iterator[tuple[dict[str, str], str | None, str | None]]:
    """The environment of the ranks, a bucket, and what plays AWS's daemon; None for what is missing here."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    bucket = url = None
    with contextlib.ExitStack() as stack:
        try:
            from tests.hyperpod_daemon import hyperpod_daemon

            url = stack.enter_context(hyperpod_daemon()).url
        except ImportError as error:
            print(f"AWS's memory tier is not measured: {error}")
        if with_s3:
            try:
                from tests import s3_server

                moto = stack.enter_context(s3_server.moto())
                moto.create_bucket("bench")
                bucket = "s3://bench"
                environment |= s3_server.environment(moto.endpoint)
            except ImportError as error:
                print(f"S3 is not measured: {error}")
        yield environment, bucket, url


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from checkpointing import peer
    from checkpointing.case import Case

    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-checkpoint-") as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-checkpoint-") as memory,
        servers(with_s3=arguments.s3_rounds > 0) as (environment, bucket, url),
    ):
        case = Case(
            ranks=arguments.ranks,
            scale=arguments.scale,
            folder=folder,
            memory_dir=memory,
            rounds=arguments.rounds,
            s3_rounds=min(arguments.s3_rounds, arguments.rounds),
            train_scale=arguments.train_scale,
            train_rounds=arguments.train_rounds,
            train_steps=arguments.train_steps,
            bucket=bucket,
            daemon_url=url,
        )
        case_file = Path(folder) / "case.json"
        case.write(case_file)
        numbers: dict[str, Any] = {"scale": case.scale, "rounds": case.rounds}

        def ranks(phase: str, count: int = arguments.ranks) -> Any:
            return run_ranks(phase, count, case_file, environment, name=f"{phase}-{count}")

        if "stall" in arguments.parts:
            numbers["stall"] = ranks("stall")
            numbers["summary"] = summary(numbers["stall"])
            print_stalls(numbers["stall"])
        if "tiers" in arguments.parts:
            numbers["save"] = ranks("save")
            numbers["load"] = {count: ranks("load", count) for count in dict.fromkeys((arguments.ranks, 1))}
            print_tiers(numbers["save"], numbers["load"])
        if "train" in arguments.parts:
            numbers["train"] = ranks("train")
            print_slowdown(numbers["train"])
        if "peer" in arguments.parts:
            numbers["peer"] = peer.measure(PEER_BYTES[case.scale], case.rounds)
            print_peer(numbers["peer"])
    return numbers


# --- what is printed -----------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Median (smallest to largest)."""
    texts = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def print_stalls(found: Mapping[str, Any]) -> None:
    from checkpointing.stall import MEMORY

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
    from checkpointing.stall import MEMORY

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
    from operator import add

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
    from checkpointing.slowdown import OFF

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--scale", choices=("small", "medium", "1b", "8b"), help="default: medium, on a GPU 1b")
    parser.add_argument("--ranks", type=int, help="default: the GPUs there are, else 2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--s3_rounds", type=int, default=3, help="0: S3 is left out")
    parser.add_argument("--train_scale", choices=("small", "medium", "1b"), default="small")
    parser.add_argument("--train_rounds", type=int, default=7)
    parser.add_argument("--train_steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder's")
    parser.add_argument("--output", type=Path, help="folder of the JSON file; default: benchmarks/results")
    for name in ("rank_phase", "case", "answer"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_phase:
        be_a_rank(arguments.rank_phase, Path(arguments.case), Path(arguments.answer))
        return
    import torch
    from results_file import save

    # So that the folders in shared memory are removed when somebody ends this.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    num_gpus = torch.cuda.device_count()
    arguments.ranks = arguments.ranks or num_gpus or 2
    arguments.scale = arguments.scale or ("1b" if num_gpus else "medium")
    sys.path.append(str(HERE.parent))  # the servers and nodes of the tests
    numbers = measure(arguments)
    print(f"\nwritten to {save('checkpoint', {'command': sys.argv, **numbers}, directory=arguments.output)}")


if __name__ == "__main__":
    main()
