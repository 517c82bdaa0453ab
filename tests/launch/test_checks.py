"""The doctor's checks: outputs of programs read as their makers document them, and trees of files as Linux has them."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launch.recorded import program, smi
from tests.s3_server import Server

from hypershard.catalog.instances import instance
from hypershard.launch import checks_cloud, checks_gpu, checks_host, checks_network, checks_place
from hypershard.launch.checks_base import Finding, Machine, Remedy, Status, version_of

BUCKET = "checkpoints"  # of the fixture s3_server
P5 = instance("p5.48xlarge")


def table(**changes: str) -> str:
    """Eight GPUs, the third one changed."""
    return "\n".join(smi(index, **(changes if index == 2 else {})) for index in range(8))


def gpu_findings(csv: str, machine: Machine | None = None) -> dict[str, Finding]:
    machine = machine or Machine(environment={}, instance=P5)
    return {finding.name: finding for finding in checks_gpu.judge_gpus(checks_gpu.parse_gpus(csv), machine)}


def tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


# --- GPUs


def test_a_healthy_node_is_ok_in_every_line() -> None:
    findings = gpu_findings(table())
    assert {finding.status for finding in findings.values()} == {Status.OK}
    assert "8 x NVIDIA H100 80GB HBM3" in findings["gpus"].found


@pytest.mark.parametrize(
    ("changes", "line", "status", "remedy"),
    [
        ({"uncorrected": "2"}, "gpu memory errors", Status.FAIL, Remedy.REBOOT),
        ({"clocks": "0x0000000000000040"}, "gpu clocks", Status.FAIL, Remedy.REPLACE),
        ({"clocks": "0x0000000000000020"}, "gpu clocks", Status.WARN, Remedy.NONE),
        ({"clocks": "0x0000000000000004"}, "gpu clocks", Status.OK, Remedy.NONE),  # its power limit: no fault
        ({"persistence": "Disabled"}, "gpu persistence", Status.WARN, Remedy.NONE),
        ({"memory.used": "70000"}, "gpu in use", Status.WARN, Remedy.NONE),
        ({"memory.total": "40536"}, "gpus", Status.FAIL, Remedy.REPLACE),
        ({"mig": "Enabled"}, "gpus", Status.FAIL, Remedy.NONE),
    ],
)
def test_what_ails_one_gpu(changes: dict[str, str], line: str, status: Status, remedy: Remedy) -> None:
    finding = gpu_findings(table(**changes))[line]
    assert (finding.status, finding.remedy) == (status, remedy)
    assert finding.fix or status is Status.OK


def test_values_that_a_gpu_does_not_have_are_none() -> None:
    (gpu,) = checks_gpu.parse_gpus(smi(corrected="[N/A]", uncorrected="[N/A]"))
    assert (gpu.corrected_errors, gpu.uncorrected_errors) == (None, None)
    with pytest.raises(ValueError, match="expected 11 values"):
        checks_gpu.parse_gpus("0, NVIDIA H100 80GB HBM3")


def test_missing_gpus_condemn_a_node_only_when_the_bus_has_lost_them(tmp_path: Path) -> None:
    seven = "\n".join(smi(index) for index in range(7))
    lost = gpu_findings(seven, Machine(root=tmp_path, environment={}, instance=P5))["gpus"]
    assert (lost.status, lost.remedy) == (Status.FAIL, Remedy.REPLACE)
    devices = {f"sys/bus/pci/devices/0000:{n:02x}:00.0/{key}": value for n in range(8)
               for key, value in (("vendor", "0x10de\n"), ("class", "0x030200\n"))}  # fmt: skip
    tree(tmp_path, devices)
    confined = Machine(root=tmp_path, environment={"SLURM_GPUS_ON_NODE": "7"}, instance=P5)
    assert gpu_findings(seven, confined)["gpus"].remedy is Remedy.NONE


def test_another_gpu_than_expected_is_no_fault_of_the_node() -> None:
    finding = gpu_findings(table(name="NVIDIA H100 80GB HBM3"), Machine(environment={}, instance=instance("p5e")))[
        "gpus"
    ]
    assert (finding.status, finding.remedy) == (Status.FAIL, Remedy.NONE)
    assert "--expect" in finding.fix


def test_remapped_rows() -> None:
    line = "00000000:53:00.0, {}, {}"
    assert checks_gpu.judge_rows(line.format("No", "No"))[0].status is Status.OK
    assert checks_gpu.judge_rows(line.format("Yes", "No"))[0].remedy is Remedy.REBOOT
    assert checks_gpu.judge_rows(line.format("Yes", "Yes"))[0].remedy is Remedy.REPLACE


KERNEL_LOG = """\
[   12.345678] nvidia 0000:53:00.0: enabling device (0140 -> 0142)
[ 2345.000001] NVRM: Xid (PCI:0000:53:00): 31, pid=4242, name=python3, Ch 00000008, intr 00000000. MMU Fault
[ 2345.000002] NVRM: Xid (PCI:0000:53:00): 43, pid=4242, name=python3, Ch 00000008
"""


def test_xids_of_a_program_warn_and_those_of_the_hardware_condemn() -> None:
    assert [xid.code for xid in checks_gpu.parse_xids(KERNEL_LOG)] == [31, 43]
    (mild,) = checks_gpu.judge_xids(checks_gpu.parse_xids(KERNEL_LOG))
    assert (mild.status, mild.found.split(":")[0]) == (Status.WARN, "Xid 31 x 1, Xid 43 x 1")
    lost = KERNEL_LOG + "[ 9.9] NVRM: Xid (PCI:0000:64:00): 79, GPU has fallen off the bus.\n"
    (bad,) = checks_gpu.judge_xids(checks_gpu.parse_xids(lost))
    assert (bad.status, bad.remedy) == (Status.FAIL, Remedy.REPLACE)
    assert "0000:64:00" in bad.found
    assert checks_gpu.judge_xids([])[0].status is Status.OK


@pytest.mark.parametrize(
    ("action", "remedy"), [("0x2 (Node Reboot Required)", Remedy.REBOOT), ("0x0 (None)", Remedy.NONE)]
)
def test_the_driver_itself_says_what_it_needs(action: str, remedy: Remedy) -> None:
    line = f"NVRM: Xid (PCI:0008:01:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to {action}"
    assert checks_gpu.judge_xids(checks_gpu.parse_xids(line))[0].remedy is remedy


def test_device_files_without_the_drivers_programs_do_not_condemn_a_node(tmp_path: Path) -> None:
    machine = Machine(root=tree(tmp_path, {"dev/nvidia0": ""}), environment={"PATH": ""}, instance=P5)
    finding = checks_gpu.CHECKS[0].examine(machine)[0]
    assert (finding.status, finding.remedy) == (Status.FAIL, Remedy.NONE)


# --- the network


FI_INFO = """\
provider: efa
    fabric: efa-direct
    domain: rdmap16s27-rdm
    version: 204.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa
    domain: rdmap16s27-rdm
    version: 204.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa
    domain: rdmap32s27-rdm
    version: 204.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: EFA-fe80::df:57ff:fe1a:beb3
    domain: rdmap32s27-dgrm
    version: 112.0
    type: FI_EP_DGRAM
    protocol: FI_PROTO_EFA
provider: efa;ofi_rxd
    fabric: EFA-fe80::df:57ff:fe1a:beb3
    domain: efa_0-dgrm
    version: 1.0
    type: FI_EP_RDM
    protocol: FI_PROTO_RXD
"""
FI_VERSION = "fi_info: 2.4.0amzn5.0\nlibfabric: 2.4.0amzn5.0\nlibfabric api: 2.4\n"


def test_fi_info() -> None:
    assert checks_network.parse_fi_info(FI_INFO) == ["rdmap16s27-rdm", "rdmap32s27-rdm"]
    assert checks_network.parse_fi_version(FI_VERSION) == "2.4.0amzn5.0"
    assert version_of("2.4.0amzn5.0") == (2, 4, 0)
    assert version_of("git-c8a3df2") == ()


def efa_machine(root: Path, *, plugin: bytes | None, num_devices: int = 32) -> Machine:
    for number in range(num_devices):
        device = root / "sys/class/infiniband" / f"rdmap{number}s27" / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to("../../../../bus/pci/drivers/efa")
    (root / "sys/class/infiniband/mlx5_0/device").mkdir(parents=True)
    (root / "sys/class/infiniband/mlx5_0/device/driver").symlink_to("../../../../bus/pci/drivers/mlx5_core")
    if plugin is not None:
        tree(root, {"opt/amazon/ofi-nccl/lib64/x": ""})
        (root / "opt/amazon/ofi-nccl/lib64/libnccl-net-ofi.so").write_bytes(plugin)
    domains = "\n".join(FI_INFO.splitlines()[6:12]).replace("rdmap16s27", "rdmap$n")
    listed = f'n=0; while [ $n -lt {num_devices} ]; do echo "{domains}"; n=$((n+1)); done'
    program(root / "bin", "fi_info", f'case "$1" in --version) echo "{FI_VERSION}";; *) {listed};; esac')
    return Machine(root=root, environment={"PATH": f"{root}/bin:{os.environ['PATH']}"}, instance=P5)


def test_efa_with_all_its_parts(tmp_path: Path) -> None:
    line = b"NET/OFI Initializing aws-ofi-nccl 1.21.1-aws\n\0"
    machine = efa_machine(tmp_path, plugin=b"\x7fELF" + bytes(2**20 - 40) + line)  # cut by the end of the first piece
    findings = {finding.name: finding for finding in checks_network.CHECKS[0].examine(machine)}
    assert {name: finding.status for name, finding in findings.items()} == dict.fromkeys(findings, Status.OK)
    assert "32 of 32" in findings["efa"].found
    assert "32 domains" in findings["libfabric"].found
    assert "1.21.1" in findings["aws-ofi-nccl"].found


def test_efa_without_the_plugin_or_the_devices_fails(tmp_path: Path) -> None:
    machine = efa_machine(tmp_path / "a", plugin=None, num_devices=4)
    findings = {finding.name: finding.status for finding in checks_network.CHECKS[0].examine(machine)}
    assert findings == {"efa": Status.WARN, "libfabric": Status.OK, "aws-ofi-nccl": Status.FAIL}
    machine = efa_machine(tmp_path / "b", plugin=None, num_devices=0)
    assert [finding.status for finding in checks_network.CHECKS[0].examine(machine)] == [Status.FAIL]


def test_variables_that_break_efa_are_named() -> None:
    machine = Machine(environment={"FI_EFA_MTU_SIZE": "8900", "NCCL_DEBUG": "INFO", "HOME": "/root"})
    (finding,) = checks_network.CHECKS[1].examine(machine)
    assert finding.status is Status.WARN
    assert "FI_EFA_MTU_SIZE" in finding.found


# --- place, host, cloud


@pytest.fixture
def metadata_service() -> Iterator[str]:
    """Answers as IMDSv2 does: no token, no answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._say(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, b"token-1")

        def do_GET(self) -> None:
            good = self.headers["X-aws-ec2-metadata-token"] == "token-1"
            self._say(200 if good and self.path == "/latest/meta-data/instance-type" else 401, b"p5.48xlarge")

        def _say(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body if code == 200 else b"")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_type_comes_from_the_metadata_service_in_its_second_version(tmp_path: Path, metadata_service: str) -> None:
    machine = Machine(root=tmp_path, environment={"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata_service})
    assert checks_place.instance_type(machine) == checks_place.Source("p5.48xlarge", "the instance metadata service")


def test_the_type_comes_from_files_before_anybody_is_asked(tmp_path: Path) -> None:
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true"}
    job = json.dumps({"current_host": "algo-1", "current_instance_type": "ml.p4d.24xlarge", "hosts": ["algo-1"]})
    sagemaker = tree(tmp_path / "sagemaker", {"opt/ml/input/config/resourceconfig.json": job})
    assert checks_place.instance_type(Machine(root=sagemaker, environment=nowhere)).instance_type == "p4d.24xlarge"
    groups = [
        {"Name": "controller-group", "InstanceType": "ml.m5.2xlarge"},
        {"Name": "workers", "InstanceType": "ml.p5.48xlarge"},
    ]
    config = {"opt/ml/config/resource_config.json": json.dumps({"InstanceGroups": groups})}
    assert checks_place.instance_type(Machine(root=tree(tmp_path / "hp", config), environment=nowhere)) == (
        checks_place.Source("p5.48xlarge", "HyperPod's resource_config.json")
    )
    firmware = {"sys/class/dmi/id/sys_vendor": "Amazon EC2\n", "sys/class/dmi/id/product_name": "g5.12xlarge\n"}
    assert checks_place.instance_type(Machine(root=tree(tmp_path / "dmi", firmware), environment=nowhere)) == (
        checks_place.Source("g5.12xlarge", "the firmware")
    )
    assert checks_place.instance_type(Machine(root=tmp_path / "none", environment=nowhere)).instance_type == ""


def test_sinfo() -> None:
    described, ill = checks_place.parse_sinfo(
        "gpu*|2|idle|gpu:h100:8(S:0-1)\ngpu*|1|down*|gpu:h100:8(S:0-1)\ngpu*|1|mix-|gpu:h100:8(S:0-1)\ncpu|4|idle~|(null)\n"
    )
    assert described == "gpu: 4 nodes with gpu:h100:8(S:0-1); cpu: 4 nodes with no GPUs"
    assert ill == ["1 down* in gpu"]


DF = """\
Filesystem         Type   1-blocks         Used   Available Capacity Mounted on
10.0.0.5@tcp:/abcd lustre 1200000000000 1100000000000 100000000000      92% /fsx data
"""


def test_df() -> None:
    (disk,) = checks_host.parse_df(DF)
    assert (disk.kind, disk.free_bytes, disk.mounted_at) == ("lustre", 100000000000, "/fsx data")


def test_disks_of_the_instance_are_found_through_raid_and_volumes(tmp_path: Path) -> None:
    check = next(check for check in checks_host.CHECKS if check.name == "disk")
    model = {f"sys/block/nvme{n}n1/device/model": "Amazon EC2 NVMe Instance Storage        \n" for n in (1, 2)}
    model["sys/block/nvme0n1/device/model"] = "Amazon Elastic Block Store\n"

    def line(name: str, mounts: str, holders: dict[str, str]) -> Finding:
        root = tree(tmp_path / name, {**model, **holders, "proc/mounts": mounts})
        findings = check.examine(Machine(root=root, environment={"PATH": os.environ["PATH"]}, instance=P5))
        return next(finding for finding in findings if finding.name == "local disks")

    root_disk = "/dev/nvme0n1p1 / ext4 rw 0 0\n"
    assert line("bare", root_disk, {}).status is Status.WARN
    raid = {"sys/block/nvme1n1/holders/md0/x": "", "sys/block/nvme2n1/holders/md0/x": ""}
    assert "/scratch" in line("raid", root_disk + "/dev/md0 /scratch xfs rw 0 0\n", raid).found
    volume = {"sys/block/nvme1n1/holders/dm-0/x": "", "sys/block/dm-0/dm/name": "vg.01-lv_ephemeral\n"}
    mounted = root_disk + "/dev/mapper/vg.01-lv_ephemeral /opt/dlami/nvme xfs rw 0 0\n"
    assert "/opt/dlami/nvme" in line("volume", mounted, volume).found


def test_the_clock_is_compared_with_s3(s3_server: Server) -> None:
    check = next(check for check in checks_cloud.CHECKS if check.name == "bucket")
    findings = {f.name: f for f in check.examine(Machine(bucket=f"s3://{BUCKET}/runs"))}
    assert [findings["bucket"].status, findings["clock"].status] == [Status.OK, Status.OK]
    missing = {f.name: f for f in check.examine(Machine(bucket="s3://no-such-bucket"))}
    assert missing["bucket"].status is Status.FAIL
    assert "404" in missing["bucket"].found
    assert missing["clock"].status is Status.OK  # a refusal bears the date too


@pytest.mark.parametrize(("skew", "status"), [(1.0, Status.OK), (-100.0, Status.WARN), (901.0, Status.FAIL)])
def test_clocks(skew: float, status: Status) -> None:
    assert checks_cloud.judge_clock(skew, "bucket").status is status


def test_credentials_are_found_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY")
    check = next(check for check in checks_cloud.CHECKS if check.name == "aws credentials")
    (finding,) = check.examine(Machine())
    assert finding.status is Status.OK
    assert finding.found.startswith("from env")
    assert "EXAMPLE" not in f"{finding.found}{finding.fix}"
