"""The host beside its GPUs: memory that may be shared and locked, disks, and the software that is installed."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..units import format_bytes
from .checks_base import Check, Finding, Machine, ask, fail, ok, warn
from .checks_network import efa_devices

_SHARED_MEMORY_BYTES = 2**30  # docker's default is 64 MiB, of which NCCL and one loader worker take more
_CHECKPOINT_BYTES = 100 * 2**30  # an 8B model with AdamW in fp32: 12 bytes a parameter, 90 GiB
_NEARLY_FULL_BYTES = 2**30
_SHARED_FILE_SYSTEMS = ("lustre", "nfs", "nfs4", "gpfs", "beegfs", "wekafs", "ceph", "fuse.mount-s3", "fuse.s3fs")
_INSTANCE_STORE = "Amazon EC2 NVMe Instance Storage"
_TORCH_SECONDS = 60.0  # a first import from a cold shared disk
_TORCH_QUESTION = (
    "import torch; print(torch.__version__, torch.version.cuda or '-', torch.cuda.is_available(), "
    "'.'.join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else '-')"
)


@dataclass(frozen=True)
class Disk:
    """One line of `df`: a mounted file system, sizes in bytes."""

    device: str
    kind: str
    size_bytes: int
    free_bytes: int
    mounted_at: str

    def __str__(self) -> str:
        return (
            f"{self.mounted_at} ({self.kind}): {format_bytes(self.free_bytes)} free of {format_bytes(self.size_bytes)}"
        )


def parse_df(text: str) -> list[Disk]:
    """Lines of `df --portability --print-type --block-size=1`; those of other shapes are left out."""
    disks = []
    for line in text.splitlines()[1:]:
        parts = line.split(maxsplit=6)
        if len(parts) == 7 and parts[2].isdigit() and parts[4].isdigit():
            disks.append(Disk(parts[0], parts[1], int(parts[2]), int(parts[4]), parts[6]))
    return disks


def disk_of(machine: Machine, path: str | Path) -> Disk | None:
    """The file system that holds `path`; None when it does not answer in time. Asks a program: a lost server hangs."""
    answer = ask(machine, ["df", "--portability", "--print-type", "--block-size=1", str(path)], limit_seconds=5.0)
    disks = parse_df(answer.text)
    return disks[0] if disks else None


def _shared_memory(machine: Machine) -> list[Finding]:
    disk = disk_of(machine, machine.file("/dev/shm"))
    if disk is None:
        return [warn("/dev/shm", "does not answer", "mount a tmpfs there")]
    if disk.size_bytes < _SHARED_MEMORY_BYTES:
        fix = "docker run --shm-size=16g or --ipc=host; Kubernetes: an emptyDir of medium Memory on /dev/shm"
        tell = fail if machine.must_train else warn
        return [tell("/dev/shm", f"{format_bytes(disk.size_bytes)}: NCCL and checkpoints in memory need more", fix)]
    return [ok("/dev/shm", f"{format_bytes(disk.size_bytes)}, {format_bytes(disk.free_bytes)} free")]


def _locked_memory(machine: Machine) -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [ok("locked memory", "unlimited")]
    if efa_devices(machine):
        fix = "ulimit -l unlimited (limits.conf: * - memlock unlimited; docker: --ulimit memlock=-1)"
        return [fail("locked memory", f"{format_bytes(soft)}: EFA registers the buffers of NCCL in it", fix)]
    return [ok("locked memory", f"{format_bytes(soft)}; only EFA needs more")]


def _disks(machine: Machine) -> list[Finding]:
    findings = []
    here = disk_of(machine, Path.cwd())
    if here is None:
        findings.append(fail("disk", f"{Path.cwd()} does not answer", "is its file server up? cd to another disk"))
    else:
        fix = "free some, or give --run_dir on another disk"
        if here.free_bytes < _NEARLY_FULL_BYTES:
            findings.append(fail("disk", str(here), fix))
        elif here.free_bytes < _CHECKPOINT_BYTES:
            findings.append(warn("disk", f"{here}; a checkpoint of an 8B model takes about 90 GiB", fix))
        else:
            findings.append(ok("disk", str(here)))
    return findings + _shared_disks(machine) + _instance_store(machine)


def _mounts(machine: Machine) -> list[tuple[str, str, str]]:
    """(device, mounted at, kind) of /proc/mounts."""
    lines = [line.split() for line in machine.read("/proc/mounts").splitlines()]
    return [(parts[0], parts[1].replace("\\040", " "), parts[2]) for parts in lines if len(parts) > 2]


def _shared_disks(machine: Machine) -> list[Finding]:
    points = [(point, kind) for _, point, kind in _mounts(machine) if kind in _SHARED_FILE_SYSTEMS]
    findings = []
    for point, kind in points:
        disk = disk_of(machine, point)
        if disk is None:
            fix = "look at the file server (FSx: its state in the console) and the network to it"
            findings.append(fail("shared disk", f"{point} ({kind}) does not answer", fix))
        elif disk.free_bytes < _CHECKPOINT_BYTES:
            findings.append(warn("shared disk", str(disk), "a checkpoint of an 8B model takes about 90 GiB: free some"))
        else:
            findings.append(ok("shared disk", str(disk)))
    if not points:
        fix = "fine for one node; several need --run_dir on a disk they share (FSx for Lustre, NFS)"
        in_cluster = "SLURM_JOB_ID" in machine.environment or machine.file("/opt/sagemaker_cluster").is_dir()
        found = "none of Lustre, NFS, GPFS, Weka, Ceph is mounted"
        findings.append(warn("shared disk", found, fix) if in_cluster else ok("shared disk", f"{found}: {fix}"))
    return findings


def _instance_store(machine: Machine) -> list[Finding]:
    """Disks that come with the instance: whether somebody mounted them, also through RAID or LVM."""
    stores = [
        path.parent.parent
        for path in sorted(machine.file("/sys/block").glob("nvme*/device/model"))
        if machine.read(str(path.relative_to(machine.root))) == _INSTANCE_STORE
    ]
    if not stores:
        if machine.instance is None or not machine.instance.nvme_gb:
            return []
        found = f"no NVMe disk of the instance is seen; {machine.instance.name} has {machine.instance.nvme_gb} GB"
        return [warn("local disks", found, "in a container: mount the host's folder on them into it")]
    # What is mounted may be a RAID (md0) or a volume made of them, which /proc/mounts calls by its name.
    holders = [holder for store in stores for holder in store.glob("holders/*")]
    names = {path.name for path in (*stores, *holders)}
    names |= {machine.read(f"/sys/block/{holder.name}/dm/name") for holder in holders} - {""}
    used = {
        point
        for device, point, _ in _mounts(machine)
        if any(re.fullmatch(re.escape(name) + r"(p\d+)?", device.rpartition("/")[2]) for name in names)
    }
    if not used:
        fix = "make a RAID 0 of them, format and mount it: fast room for checkpoints and data (--local_tier_dir)"
        return [warn("local disks", f"{len(stores)} NVMe disks of the instance, none mounted", fix)]
    return [ok("local disks", f"{len(stores)} NVMe disks of the instance, at {', '.join(sorted(used))}")]


def _software(machine: Machine) -> list[Finding]:
    python = f"Python {sys.version.split()[0]}"
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        tell = fail if machine.must_train else warn
        fix = "make install, or pip install -c constraints.txt -e . (a login node that only submits needs none)"
        return [tell("torch", f"not installed in {python}", fix)]
    answer = ask(machine, [sys.executable, "-c", _TORCH_QUESTION], limit_seconds=_TORCH_SECONDS)
    words = answer.text.split()
    if answer.trouble or len(words) < 4:
        trouble = answer.trouble or f"said {answer.text.strip()[:200]!r}"
        return [fail("torch", f"{installed} in {python} does not start: {trouble}", "install it anew: make install")]
    version, cuda, available, nccl = words[-4:]
    shown = f"{version} in {python}, CUDA {cuda}, NCCL {nccl}"
    has_gpu = any(machine.file("/dev").glob("nvidia[0-9]*"))
    if available == "True" or not has_gpu:
        return [ok("torch", shown if available == "True" else f"{shown}: it sees no GPU, and there is none")]
    built = "it is built without CUDA" if cuda == "-" else f"the driver may be too old for CUDA {cuda}"
    return [fail("torch", f"{shown}: it sees no GPU although there is one", f"{built}: update the driver or torch")]


CHECKS = (
    Check("/dev/shm", _shared_memory),
    Check("locked memory", _locked_memory),
    Check("disk", _disks, limit_seconds=30.0),
    Check("torch", _software, limit_seconds=_TORCH_SECONDS + 2.0),
)
