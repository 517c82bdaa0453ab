"""The doctor: nothing hangs it, what it says of an all-reduce, and the real thing on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.launch.recorded import program, smi

from hypershard.catalog.instances import instance
from hypershard.distributed.env import Ranks
from hypershard.errors import ConfigError
from hypershard.launch import checks_gpu, doctor
from hypershard.launch.checks_base import Check, Finding, Machine, Remedy, Status, ask, ok, run_checks
from hypershard.launch.checks_probe import NcclLog, Outcome, judge, parse_nccl_log, run_probe
from hypershard.launch.verdict import unwell

P5 = instance("p5.48xlarge")


# --- nothing hangs


def test_a_program_that_hangs_is_left(tmp_path: Path) -> None:
    # Its child keeps the pipe open, so a reader that waits for the end of the output waits for the child.
    program(tmp_path, "nvidia-smi", f"(sleep 60; : > {tmp_path}/ended) & wait")
    answer = ask(Machine(environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"}), ["nvidia-smi"], limit_seconds=0.3)
    assert answer.trouble == "nvidia-smi gave no answer within 0.3 s"
    assert not (tmp_path / "ended").exists(), "it was waited for"


def test_a_check_that_hangs_or_breaks_takes_no_other_with_it() -> None:
    def breaks(_: Machine) -> list[Finding]:
        raise RuntimeError("no such thing")

    def hangs(_: Machine) -> list[Finding]:
        threading.Event().wait()
        return []

    checks = [Check("a", hangs, 0.1), Check("b", breaks, 5.0), Check("c", lambda _: [ok("c", "fine")], 5.0)]
    findings = run_checks(checks, Machine(environment={}))
    assert [(finding.name, finding.status) for finding in findings] == [
        ("a", Status.WARN),
        ("b", Status.WARN),
        ("c", Status.OK),
    ]
    assert "RuntimeError: no such thing" in findings[1].found


# --- the all-reduce


NCCL_LOG = """\
ip-10-0-1-7:6158:6158 [0] NCCL INFO NCCL version 2.27.3+cuda12.9
ip-10-0-1-7:6158:9214 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.21.1-aws
ip-10-0-1-7:6158:9214 [0] NCCL INFO NET/OFI Using Libfabric version 2.4
ip-10-0-1-7:6158:9214 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
ip-10-0-1-7:6158:9214 [0] NCCL INFO Using network Libfabric
ip-10-0-1-7:6158:9214 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/Libfabric/0/GDRDMA/Shared
"""


def test_nccl_log() -> None:
    assert parse_nccl_log(NCCL_LOG) == NcclLog("2.27.3", "1.21.1-aws", "2.4", "efa", 32, "Libfabric", True)
    old = "NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)\n"
    assert (parse_nccl_log(old).provider, parse_nccl_log(old).num_interfaces) == ("efa", 4)
    assert parse_nccl_log("NCCL INFO Using network Socket\n").provider == ""


def seen(
    rank: int, *, node: float, world: float | None = None, is_right: bool = True, **changes: Any
) -> dict[str, Any]:
    def result(num_ranks: int, speed: float) -> dict[str, Any]:
        return {"num_ranks": num_ranks, "num_bytes": 2**30, "gb_per_second": speed, "is_right": is_right}

    return {
        "rank": rank,
        "host": "p5-1",
        "backend": "nccl",
        "node": result(8, node),
        "world": None if world is None else result(16, world),
        "ill": {},
        "absent": [],
        "error": "",
        **changes,
    }


def judged(num_nodes: int, log: str = NCCL_LOG, **changes: Any) -> dict[str, Finding]:
    outcome = Outcome({rank: seen(rank, **changes) for rank in range(8)}, parse_nccl_log(log))
    findings = judge(outcome, num_nodes=num_nodes, ranks_per_node=8, instance=P5)
    return {finding.name: finding for finding in findings}


def test_bandwidth_is_judged_against_what_was_measured_elsewhere() -> None:
    good = judged(2, node=450.0, world=430.0)
    assert {finding.status for finding in good.values()} == {Status.OK}
    assert "98% of 437" in good["all-reduce over nodes"].found
    slow_links = judged(2, node=100.0, world=430.0)["all-reduce in the node"]
    assert (slow_links.status, slow_links.remedy) == (Status.FAIL, Remedy.REBOOT)
    # Nobody can say whose fault this is, so no node is condemned.
    slow_network = judged(2, node=450.0, world=100.0)["all-reduce over nodes"]
    assert (slow_network.status, slow_network.remedy) == (Status.FAIL, Remedy.NONE)
    assert judged(2, node=450.0, world=300.0)["all-reduce over nodes"].status is Status.WARN


def test_nccl_over_tcp_fails_where_the_instance_has_efa() -> None:
    log = NCCL_LOG.splitlines()[0] + "\nNCCL INFO Using network Socket\n"
    finding = judged(2, log=log, node=450.0, world=430.0)["network"]
    assert finding.status is Status.FAIL
    assert "talks over Socket" in finding.found
    without = NCCL_LOG.replace("/GDRDMA", "")
    assert judged(2, log=without, node=450.0, world=430.0)["network"].status is Status.WARN


def test_a_wrong_sum_inside_a_node_condemns_it() -> None:
    finding = judged(1, node=450.0, is_right=False)["all-reduce in the node"]
    assert (finding.status, finding.remedy) == (Status.FAIL, Remedy.REPLACE)


def test_the_evidence_names_the_worst_and_its_reason() -> None:
    ecc = Finding("gpu memory errors", Status.FAIL, "GPU 2: 1", "", Remedy.REBOOT)
    bus = Finding("gpu errors (Xid)", Status.FAIL, "Xid 79", "", Remedy.REPLACE)
    line = doctor.NodeReport("p5-7", (ecc, bus)).evidence()
    assert line == {"host": "p5-7", "verdict": "replace", "reason": "gpu errors (Xid): Xid 79"}
    (ill,) = unwell("", json.dumps(line)).ill
    assert (ill.name, ill.remedy) == ("p5-7", "Replace")
    slow = Finding("all-reduce over nodes", Status.FAIL, "slow", "")
    report = doctor.NodeReport("p5-7", (slow,))
    assert report.failed
    assert not unwell("", json.dumps(report.evidence())).ill


# --- the real thing, here


def run_doctor(*flags: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    code = f"import sys; from hypershard.cli.doctor import run; sys.exit(run({list(flags)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(variables or {})}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def slurm_task(number: int) -> dict[str, str]:
    """What srun gives the only task of node `number` of two; both are this machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURMD_NODENAME": f"node-{number}",
    }


def test_two_ranks_without_gpus_get_the_right_sum() -> None:
    outcome = run_probe(doctor.node_place(), ranks_per_node=2, trouble="", limit_seconds=100, num_bytes=2**16)
    assert sorted(outcome.seen) == [0, 1], outcome.printed
    result = outcome.seen[0]["node"]
    assert (result["num_ranks"], result["is_right"], outcome.seen[0]["backend"]) == (2, True, "gloo")
    assert result["gb_per_second"] > 0


def test_a_node_that_is_ill_says_so_and_the_others_do_not_wait(tmp_path: Path) -> None:
    """Two nodes of a step: one finds an uncorrected memory error on its GPU, the other is well."""
    script = f'case "$1" in --query-gpu=*) echo "{smi(uncorrected="2")}";; *) echo "00000000:53:00.0, No, No";; esac'
    program(tmp_path, "nvidia-smi", script)
    flags = ("--node", "--nproc_per_node", "1", "--limit_seconds", "100")
    tasks = [slurm_task(0), {**slurm_task(1), "PATH": f"{tmp_path}:{os.environ['PATH']}"}]
    started = [run_doctor(*flags, variables=task) for task in tasks]
    lines = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert [(line["host"], line["verdict"]) for line in lines] == [("node-0", "ok"), ("node-1", "reboot")]
    assert "uncorrected errors" in lines[0]["reason"]  # whose it is, the other node reads too
    assert [node.name for node in unwell("", "\n".join(map(json.dumps, lines))).ill] == ["node-1"]


def test_a_node_that_never_comes_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first_of_two = Ranks(0, 2, master_port=port, launcher="srun")
    outcome = run_probe(first_of_two, ranks_per_node=1, trouble="", limit_seconds=15, num_bytes=2**10)
    finding = judge(outcome, num_nodes=2, ranks_per_node=1, instance=None)[-1]
    assert (finding.status, finding.remedy) == (Status.FAIL, Remedy.NONE)
    assert "node 1 did not come in time" in finding.found


def test_one_task_per_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**slurm_task(0), "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--ntasks-per-node=1"):
        doctor.node_place()


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_a_machine_without_gpus_is_told_so() -> None:
    process = run_doctor("--json")
    output, _ = process.communicate(timeout=120)
    findings = {finding["name"]: finding for finding in json.loads(output)["findings"]}
    assert findings["gpus"]["found"].startswith("no GPU")
    assert {"place", "instance type", "/dev/shm", "disk", "torch", "aws credentials"} <= findings.keys()
    failed = [finding for finding in findings.values() if finding["status"] == "FAIL"]
    assert process.returncode == (1 if failed else 0)
    finding = checks_gpu.CHECKS[0].examine(Machine(instance=P5))[0]
    assert (finding.status, finding.remedy) == (Status.FAIL, Remedy.NONE)
    assert "expected 8 x H100 SXM on p5.48xlarge" in finding.found
