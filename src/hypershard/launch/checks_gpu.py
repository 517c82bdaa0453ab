"""GPUs as the driver and the kernel describe them: how many, which, and whether one is ill."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..catalog.gpus import gpu_by_device_name
from ..catalog.instances import Instance
from .checks_base import Check, Finding, Machine, Remedy, ask, fail, ok, warn

# Field names of `nvidia-smi --help-query-gpu`, driver R535 and newer; torch 2.11 needs a newer one anyway.
_FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
    "persistence_mode",
    "clocks_event_reasons.active",
    "temperature.gpu",
    "driver_version",
    "mig.mode.current",
)
_ROW_FIELDS = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")
# nvmlClocksEventReasons in nvml.h. The others are no fault: idle, a power limit, clocks somebody set.
_HW_SLOWDOWN, _SW_THERMAL, _HW_THERMAL, _HW_POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
_SLOWED_BY_HARDWARE = {
    _HW_SLOWDOWN: "hardware slowdown",
    _HW_THERMAL: "too hot (hardware)",
    _HW_POWER_BRAKE: "power brake",
}
_MEMORY_SHARE = 0.93  # a driver shows 1 to 7 % less than the nominal size
_USED_MIB = 1024  # more than the driver keeps for itself (up to 700 MiB on a B200)

# NVIDIA's Xid catalog, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, read 2026-11: its
# RESET_GPU is a reboot here, which resets them all. 64 and 79 point at the board or its slot, and on rented machines
# another board is another node. What it gives RESTART_APP or IGNORE is a program's error, or harmless.
_XIDS: dict[int, tuple[str, Remedy]] = {
    46: ("GPU stopped processing", Remedy.REBOOT),
    48: ("double-bit ECC error", Remedy.REBOOT),
    62: ("micro-controller halted", Remedy.REBOOT),
    64: ("memory row could not be remapped", Remedy.REPLACE),
    74: ("NVLink error", Remedy.REBOOT),
    79: ("GPU has fallen off the bus", Remedy.REPLACE),
    95: ("uncontained memory error", Remedy.REBOOT),
    109: ("context switch time-out", Remedy.REBOOT),
    110: ("security fault", Remedy.REBOOT),
    119: ("GSP does not answer", Remedy.REBOOT),
    120: ("GSP error", Remedy.REBOOT),
    136: ("NVLink training failed", Remedy.REBOOT),
    140: ("unrecovered ECC error", Remedy.REBOOT),
    143: ("GPU initialisation failed", Remedy.REBOOT),
}
_RECOVERY_ACTION = 154  # the driver itself says what it needs: "changed from 0x0 (None) to 0x2 (Node Reboot Required)"
_XID_LINE = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:, *(.*))?")
_FIX = {
    Remedy.REBOOT: "reboot the node (HyperPod: scontrol update node=NODE state=fail reason='Action:Reboot')",
    Remedy.REPLACE: "replace the node (HyperPod: scontrol update node=NODE state=fail reason='Action:Replace')",
}


@dataclass(frozen=True)
class GpuState:
    """One GPU, as nvidia-smi shows it; None where it has no such thing (a MIG slice has no ECC counters)."""

    index: int
    name: str
    memory_mib: int | None
    used_mib: int | None
    corrected_errors: int | None
    uncorrected_errors: int | None
    is_persistent: bool | None
    slowed: int
    temperature_celsius: int | None
    driver: str
    has_mig: bool


@dataclass(frozen=True)
class Xid:
    """One error that the driver wrote to the kernel log."""

    pci: str
    code: int
    text: str


def parse_gpus(csv: str) -> list[GpuState]:
    """Lines of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`. Raises ValueError for other shapes."""
    gpus = []
    for line in csv.splitlines():
        if not line.strip():
            continue
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS):
            raise ValueError(f"nvidia-smi printed {line!r}; expected {len(_FIELDS)} values")
        row = dict(zip(_FIELDS, values, strict=True))
        reasons = row["clocks_event_reasons.active"]
        gpus.append(
            GpuState(
                index=int(row["index"]),
                name=row["name"],
                memory_mib=_number(row["memory.total"]),
                used_mib=_number(row["memory.used"]),
                corrected_errors=_number(row["ecc.errors.corrected.volatile.total"]),
                uncorrected_errors=_number(row["ecc.errors.uncorrected.volatile.total"]),
                is_persistent=_switch(row["persistence_mode"]),
                slowed=int(reasons, 16) if reasons.startswith("0x") else 0,
                temperature_celsius=_number(row["temperature.gpu"]),
                driver=row["driver_version"],
                has_mig=row["mig.mode.current"] == "Enabled",
            )
        )
    return gpus


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _switch(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)


def parse_xids(kernel_log: str) -> list[Xid]:
    """Xid lines of `dmesg` or `journalctl -k`, oldest first."""
    return [Xid(pci, int(code), (text or "").strip()) for pci, code, text in _XID_LINE.findall(kernel_log)]


def judge_gpus(gpus: Sequence[GpuState], machine: Machine) -> list[Finding]:
    """What the table of GPUs says about this node, compared with its catalog row where the type is known."""
    names = sorted({gpu.name for gpu in gpus})
    memory = min((gpu.memory_mib for gpu in gpus if gpu.memory_mib), default=None)
    shown = f"{len(gpus)} x {', '.join(names)}" + (f", {memory} MiB each, driver {gpus[0].driver}" if memory else "")
    findings = [_judge_kind(gpus, machine, shown, memory)]
    bad = [f"GPU {gpu.index}: {gpu.uncorrected_errors}" for gpu in gpus if gpu.uncorrected_errors]
    counted = [gpu for gpu in gpus if gpu.uncorrected_errors is not None]
    if bad:
        found = f"uncorrected errors since the driver was loaded: {', '.join(bad)}"
        findings.append(fail("gpu memory errors", found, _FIX[Remedy.REBOOT], Remedy.REBOOT))
    elif counted:
        corrected = sum(gpu.corrected_errors or 0 for gpu in gpus)
        findings.append(ok("gpu memory errors", f"none uncorrected, {corrected} corrected (ECC is on)"))
    else:
        fix = "nvidia-smi --ecc-config=1 and a reboot, where the GPU has ECC"
        findings.append(warn("gpu memory errors", "ECC is off or not shown: a flipped bit would go unnoticed", fix))
    return findings + _judge_running(gpus)


def _judge_kind(gpus: Sequence[GpuState], machine: Machine, shown: str, memory_mib: int | None) -> Finding:
    instance = machine.instance
    if any(gpu.has_mig for gpu in gpus):
        return fail(
            "gpus", f"{shown}; MIG is on", "nvidia-smi --multi-instance-gpu=0 and a reboot: FSDP needs whole GPUs"
        )
    if instance is None:
        return ok("gpus", shown)
    expected = f"{instance.num_gpus} x {instance.gpu.name} on {instance.name}"
    if len(gpus) < instance.num_gpus:
        return _missing(machine, instance, f"{shown}; expected {expected}")
    row = gpu_by_device_name(gpus[0].name)
    if row is None or row != instance.gpu:
        return fail("gpus", f"{shown}; expected {expected}", "give the type this node has: --expect INSTANCE")
    if memory_mib is not None and memory_mib < _MEMORY_SHARE * instance.gpu_memory_mib:
        found = f"{shown}; expected {instance.gpu_memory_mib} MiB each"
        return fail("gpus", found, _FIX[Remedy.REPLACE], Remedy.REPLACE)
    return ok("gpus", f"{shown}, as {instance.name} has")


def _missing(machine: Machine, instance: Instance, found: str) -> Finding:
    """Fewer GPUs than the type has: lost ones, or ones that this job or container was not given."""
    # The bus shows all of them, in a container too: vendor NVIDIA, class display or 3D controller.
    num_on_bus = sum(
        machine.read(f"/sys/bus/pci/devices/{device.name}/vendor") == "0x10de"
        and machine.read(f"/sys/bus/pci/devices/{device.name}/class").startswith(("0x0300", "0x0302"))
        for device in machine.file("/sys/bus/pci/devices").glob("*")
    )
    given = machine.environment.get("SLURM_GPUS_ON_NODE", "")
    is_confined = (given.isdigit() and int(given) < instance.num_gpus) or any(
        machine.file(path).exists() for path in ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")
    )
    if is_confined and num_on_bus >= instance.num_gpus:
        fix = f"ask for all: --gpus-per-node={instance.num_gpus} --exclusive, docker --gpus all, nvidia.com/gpu"
        return fail("gpus", f"{found}; the bus shows {num_on_bus}, so this job was given fewer", fix)
    if is_confined and not num_on_bus:
        return fail("gpus", f"{found}; lost, or not given to this job: unknown", "run this outside of the container")
    return fail("gpus", f"{found}; the bus shows {num_on_bus}", _FIX[Remedy.REPLACE], Remedy.REPLACE)


def _judge_running(gpus: Sequence[GpuState]) -> list[Finding]:
    findings = []
    slowed = [
        f"GPU {gpu.index}: {text} at {gpu.temperature_celsius} C"
        for gpu in gpus
        for bit, text in _SLOWED_BY_HARDWARE.items()
        if gpu.slowed & bit
    ]
    warm = [f"GPU {gpu.index}: {gpu.temperature_celsius} C" for gpu in gpus if gpu.slowed & _SW_THERMAL]
    if slowed:
        findings.append(fail("gpu clocks", "; ".join(slowed), _FIX[Remedy.REPLACE], Remedy.REPLACE))
    elif warm:
        fix = "the slowest GPU sets the pace of all: look at the node's cooling, or take another node"
        findings.append(warn("gpu clocks", f"slowed by heat: {', '.join(warm)}", fix))
    else:
        findings.append(ok("gpu clocks", "not slowed by heat or power"))
    off = [str(gpu.index) for gpu in gpus if gpu.is_persistent is False]
    if off:
        fix = "nvidia-smi --persistence-mode=1 (as root), or start nvidia-persistenced"
        findings.append(warn("gpu persistence", f"off on GPU {', '.join(off)}: each start waits for the driver", fix))
    used = [f"GPU {gpu.index}: {gpu.used_mib} MiB" for gpu in gpus if (gpu.used_mib or 0) > _USED_MIB]
    if used:
        fix = "end what runs there: nvidia-smi --query-compute-apps=pid,used_memory --format=csv"
        findings.append(warn("gpu in use", f"memory is taken: {', '.join(used)}", fix))
    return findings


def judge_rows(csv: str) -> list[Finding]:
    """Lines of `nvidia-smi --query-remapped-rows=…`: bad rows of memory that wait for a reset, or have no spare."""
    pending, failed = [], []
    for line in csv.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(_ROW_FIELDS):
            pending += [values[0]] if values[1] in ("Yes", "1") else []
            failed += [values[0]] if values[2] in ("Yes", "1") else []
    if failed:
        found = f"no spare row left for a bad one: {', '.join(failed)}"
        return [fail("gpu memory rows", found, _FIX[Remedy.REPLACE], Remedy.REPLACE)]
    if pending:
        found = f"a bad row waits for a reset: {', '.join(pending)}"
        return [fail("gpu memory rows", found, _FIX[Remedy.REBOOT], Remedy.REBOOT)]
    return [ok("gpu memory rows", "none waits to be remapped")]


def judge_xids(xids: Sequence[Xid]) -> list[Finding]:
    """What the driver wrote since the boot: ours to act on, or a program's own mistakes."""
    serious: dict[str, Remedy] = {}
    others: dict[int, int] = {}
    for xid in xids:
        meaning, remedy = _XIDS.get(xid.code, (xid.text, Remedy.NONE))
        if xid.code == _RECOVERY_ACTION:
            needed = xid.text.rpartition(" to ")[2]
            remedy = Remedy.REBOOT if "Reset" in needed or "Reboot" in needed else Remedy.NONE
        if remedy is Remedy.NONE:
            others[xid.code] = others.get(xid.code, 0) + 1
        else:
            serious[f"Xid {xid.code} on {xid.pci}: {meaning}"] = remedy
    if serious:
        worst = Remedy.REPLACE if Remedy.REPLACE in serious.values() else Remedy.REBOOT
        return [fail("gpu errors (Xid)", "; ".join(serious), _FIX[worst], worst)]
    if others:
        found = ", ".join(f"Xid {code} x {number}" for code, number in sorted(others.items()))
        return [warn("gpu errors (Xid)", f"{found}: a program's error, or harmless", "look for what ran at that time")]
    return [ok("gpu errors (Xid)", "none since the boot")]


def _examine(machine: Machine) -> list[Finding]:
    answer = ask(machine, ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"])
    gpus = [] if answer.trouble else parse_gpus(answer.text)
    if gpus:
        rows = ask(machine, ["nvidia-smi", f"--query-remapped-rows={','.join(_ROW_FIELDS)}", "--format=csv,noheader"])
        return judge_gpus(gpus, machine) + ([] if rows.trouble else judge_rows(rows.text)) + _xids(machine)
    device_files = sorted(path.name for path in machine.file("/dev").glob("nvidia[0-9]*"))
    trouble = answer.trouble or "nvidia-smi lists none"
    if device_files:
        found = f"{len(device_files)} device files in /dev, but {trouble}"
        if trouble.endswith("is not installed"):
            fix = "install the driver's programs; in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            return [fail("gpus", found, fix), *_xids(machine)]
        return [fail("gpus", found, _FIX[Remedy.REBOOT], Remedy.REBOOT), *_xids(machine)]
    if machine.instance is not None:
        wanted = f"expected {machine.instance.num_gpus} x {machine.instance.gpu.name} on {machine.instance.name}"
        fix = "install the NVIDIA driver; in a container start it with --gpus all (Kubernetes: nvidia.com/gpu)"
        return [fail("gpus", f"no GPU: {trouble}, and /dev has none; {wanted}", fix)]
    fix = "fine on a login node and for small models on CPUs; to train large ones run this on a GPU node"
    return [warn("gpus", f"no GPU: {trouble}, and /dev has none", fix)]


def _xids(machine: Machine) -> list[Finding]:
    answer = ask(machine, ["dmesg"])
    if answer.trouble:
        answer = ask(machine, ["journalctl", "--dmesg", "--boot", "--no-pager"])
    if answer.trouble:
        fix = "run as root on the node itself (a Slurm prolog does), not in a container"
        return [warn("gpu errors (Xid)", f"not checked, the kernel log is not ours to read: {answer.trouble}", fix)]
    return judge_xids(parse_xids(answer.text))


# Three programs after each other, each with its own limit.
CHECKS = (Check("gpus", _examine, limit_seconds=33.0),)
