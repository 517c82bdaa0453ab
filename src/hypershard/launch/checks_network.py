"""The network between nodes: EFA's devices, libfabric, NCCL's plugin that uses them, and settings that break it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from .checks_base import Check, Finding, Machine, ask, fail, ok, version_of, warn
from .environment import check_extra

# From these on EFA is used without any variable: awslabs/awsome-distributed-training, efa-cheatsheet.md, 2026.
_LIBFABRIC, _PLUGIN = (1, 18), (1, 7)
_INSTALLER = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-start-nccl.html"
_FI_INFO = ("fi_info", "/opt/amazon/efa/bin/fi_info")
_PLUGIN_FOLDERS = (  # the EFA installer's on Amazon Linux and Ubuntu, then where older images built it
    "/opt/amazon/ofi-nccl/lib64",
    "/opt/amazon/ofi-nccl/lib",
    "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
    "/opt/aws-ofi-nccl/lib",
    "/opt/aws-ofi-nccl/install/lib",
)
_PLUGIN_FILES = ("libnccl-net-ofi.so", "libnccl-net.so")
_PLUGIN_VERSION = re.compile(rb"aws-ofi-nccl (\d+\.\d+(?:\.\d+)?)")
_CHUNK_BYTES = 2**20
_SETTINGS = re.compile(r"(NCCL|FI|RDMAV|TORCH_NCCL)_.*")


def parse_fi_info(text: str) -> list[str]:
    """Domains (`rdmap16s27-rdm`) of the efa provider's reliable endpoints in `fi_info -p efa`, each once."""
    domains: dict[str, None] = {}
    for block in re.split(r"^\s*provider:", text, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^\s*(domain|type): *(\S+)", block, flags=re.MULTILINE))
        if block.split(maxsplit=1)[0] == "efa" and fields.get("type") == "FI_EP_RDM" and "domain" in fields:
            domains[fields["domain"]] = None
    return list(domains)


def parse_fi_version(text: str) -> str:
    """`libfabric: 2.4.0amzn5.0` of `fi_info --version` -> `2.4.0amzn5.0`; "" when it is not there."""
    match = re.search(r"^libfabric: *(\S+)", text, flags=re.MULTILINE)
    return match.group(1) if match else ""


def efa_devices(machine: Machine) -> list[str]:
    """Names in /sys/class/infiniband that the efa driver made; a Mellanox card is none."""
    found = []
    for device in sorted(machine.file("/sys/class/infiniband").glob("*")):
        driver = device / "device" / "driver"
        if driver.is_symlink() and driver.readlink().name == "efa":
            found.append(device.name)
    return found


def _efa(machine: Machine) -> list[Finding]:
    devices = efa_devices(machine)
    expected = machine.instance.efa_interfaces if machine.instance else None
    if not expected:
        if not devices:
            return [ok("efa", "no EFA device" + (f", as {machine.instance.name} has" if machine.instance else ""))]
        return [ok("efa", f"{len(devices)} devices"), *_libfabric(machine, len(devices)), *_plugin(machine)]
    assert machine.instance is not None
    of = f"{len(devices)} of {expected} devices of {machine.instance.name}"
    if not devices:
        fix = (
            "attach EFA interfaces at launch (HyperPod and ParallelCluster do), load the efa module; in a container "
            "pass /dev/infiniband in (Kubernetes: vpc.amazonaws.com/efa)"
        )
        # Where EFA cannot reach GPU memory, TCP is slower but no waste of the machine.
        return [(fail if machine.instance.gpudirect_rdma else warn)("efa", of, fix)]
    if len(devices) < expected:
        fix = f"launch with {expected} interfaces of type efa (a pod: vpc.amazonaws.com/efa: {expected})"
        findings = [warn("efa", of, fix)]
    else:
        findings = [ok("efa", of)]
    return [*findings, *_libfabric(machine, len(devices)), *_plugin(machine)]


def _libfabric(machine: Machine, num_devices: int) -> list[Finding]:
    for program in _FI_INFO:
        answer = ask(machine, [program, "--version"])
        if not answer.trouble.endswith("is not installed"):
            break
    version = parse_fi_version(answer.text)
    if not version:
        return [warn("libfabric", answer.trouble or "fi_info gives no version", f"run the EFA installer: {_INSTALLER}")]
    listed = ask(machine, [program, "-p", "efa", "-t", "FI_EP_RDM"])
    domains = parse_fi_info(listed.text)
    if listed.trouble or not domains:
        trouble = listed.trouble or "no domain of the efa provider"
        return [fail("libfabric", f"{version}, but {trouble}", f"run the EFA installer: {_INSTALLER}")]
    found = f"{version}, provider efa on {len(domains)} domains"
    if version_of(version) < _LIBFABRIC:
        return [warn("libfabric", f"{found}; older than 1.18", f"run a newer EFA installer: {_INSTALLER}")]
    if len(domains) < num_devices:
        return [
            warn("libfabric", f"{found} of {num_devices} devices", "fi_info -p efa; a pod needs all of /dev/infiniband")
        ]
    return [ok("libfabric", found)]


def _plugin(machine: Machine) -> list[Finding]:
    folders = [
        *(machine.file(folder) for folder in _PLUGIN_FOLDERS),
        *(Path(folder) for folder in machine.environment.get("LD_LIBRARY_PATH", "").split(":") if folder),
    ]
    files = [folder / name for folder in folders for name in _PLUGIN_FILES if (folder / name).is_file()]
    if not files:
        fix = f"without it NCCL talks TCP, many times slower: run the EFA installer ({_INSTALLER})"
        return [fail("aws-ofi-nccl", "the plugin is in none of its usual folders nor in LD_LIBRARY_PATH", fix)]
    version = plugin_version(files[0])
    if version and version_of(version) < _PLUGIN:
        return [
            warn("aws-ofi-nccl", f"{version} at {files[0]}; older than 1.7", f"a newer EFA installer: {_INSTALLER}")
        ]
    return [ok("aws-ofi-nccl", f"{version or 'version unknown'} at {files[0]}")]


def plugin_version(library: Path) -> str:
    """The version in the line that the plugin prints at its start, a text in its file; "" when it is not there."""
    try:
        for chunk in _chunks(library):
            match = _PLUGIN_VERSION.search(chunk)
            if match:
                return match.group(1).decode()
    except OSError:
        pass
    return ""


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in pieces that overlap, so that nothing short is cut in two."""
    rest = b""
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield rest + piece
            rest = piece[-100:]


def _settings(machine: Machine) -> list[Finding]:
    """Variables of this shell that a job would inherit, and that break it or do nothing."""
    findings = []
    for name in sorted(machine.environment):
        if not _SETTINGS.fullmatch(name):
            continue
        try:
            check_extra({name: machine.environment[name]})
        except ConfigError as error:
            found = str(error).partition(": this variable ")[2].rpartition(";")[0] or str(error)
            findings.append(warn("environment", f"{name} {found}", f"unset {name}, also in the job's script"))
    return findings or [ok("environment", "no variable of NCCL or EFA that breaks them")]


CHECKS = (Check("efa", _efa, limit_seconds=35.0), Check("environment", _settings))
