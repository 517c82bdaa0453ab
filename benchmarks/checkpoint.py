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
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RANK_SECONDS = 3600  # longer than any part takes; a hang should end
PARTS = ("stall", "tiers", "train", "peer")
PEER_BYTES = {"small": 40 * 10**6, "medium": 600 * 10**6, "1b": 10**9, "8b": 10**9}  # about what a rank saves


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
    from checkpointing import peer, show
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
            numbers["summary"] = show.summary(numbers["stall"])
            show.print_stalls(numbers["stall"])
        if "tiers" in arguments.parts:
            numbers["save"] = ranks("save")
            numbers["load"] = {count: ranks("load", count) for count in dict.fromkeys((arguments.ranks, 1))}
            show.print_tiers(numbers["save"], numbers["load"])
        if "train" in arguments.parts:
            numbers["train"] = ranks("train")
            show.print_slowdown(numbers["train"])
        if "peer" in arguments.parts:
            numbers["peer"] = peer.measure(PEER_BYTES[case.scale], case.rounds)
            show.print_peer(numbers["peer"])
    return numbers


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
