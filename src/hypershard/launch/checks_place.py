"""Where we are: what kind of machine this is, which type AWS calls it, what its cluster says of itself."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from .checks_base import Answer, Check, Finding, Machine, ask, ok, warn

_METADATA = "http://169.254.169.254"
_METADATA_SECONDS = 1.0  # the service is on the host itself and answers in milliseconds, or there is none
_SINFO_FORMAT = "%P|%D|%t|%G"  # partition, nodes, state, generic resources
_ILL_STATES = ("down", "drain", "fail", "error", "unk", "inval")


@dataclass(frozen=True)
class Source:
    """An instance type and who says so; the type is "" when nobody does."""

    instance_type: str
    said_by: str


def instance_type(machine: Machine, *, ask_network: bool = True) -> Source:
    """The type of this machine, from the first that knows: SageMaker's and HyperPod's files, the firmware, the service.

    The service is last: it alone needs the network (`ask_network`), and waits a second where there is none.
    """
    ways: list[tuple[str, Callable[[Machine], str]]] = [
        ("SageMaker's resourceconfig.json", _from_sagemaker),
        ("HyperPod's resource_config.json", _from_hyperpod),
        ("the firmware", _from_firmware),
    ]
    if ask_network:
        ways.append(("the instance metadata service", _from_metadata))
    for said_by, read in ways:
        name = read(machine).strip().removeprefix("ml.")
        if name:
            return Source(name, said_by)
    return Source("", "")


def _json(machine: Machine, path: str) -> dict[str, object]:
    try:
        value = json.loads(machine.read(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _from_sagemaker(machine: Machine) -> str:
    return str(_json(machine, "/opt/ml/input/config/resourceconfig.json").get("current_instance_type", ""))


def _from_hyperpod(machine: Machine) -> str:
    """The type of all groups but the controller's and the login nodes'; "" where that is not one type."""
    groups = _json(machine, "/opt/ml/config/resource_config.json").get("InstanceGroups", [])
    found = {
        str(group.get("InstanceType", ""))
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, dict) and not str(group.get("Name", "")).lower().startswith(("controller", "login"))
    }
    # The file is the same on the controller: what this very node is, its firmware knows better.
    return found.pop() if len(found) == 1 and not _from_firmware(machine) else ""


def _from_firmware(machine: Machine) -> str:
    vendor = machine.read("/sys/class/dmi/id/sys_vendor")
    return machine.read("/sys/class/dmi/id/product_name") if vendor == "Amazon EC2" else ""


def _from_metadata(machine: Machine) -> str:
    """IMDSv2: a token first, then the question. "" where nobody answers, or it is switched off."""
    base = machine.environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _METADATA).rstrip("/")
    if machine.environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true" or not base.startswith("http"):
        return ""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own host
    wanted = urllib.request.Request(
        f"{base}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    try:
        with opener.open(wanted, timeout=_METADATA_SECONDS) as answer:
            token = answer.read(4096).decode("ascii")
        wanted = urllib.request.Request(
            f"{base}/latest/meta-data/instance-type", headers={"X-aws-ec2-metadata-token": token}
        )
        with opener.open(wanted, timeout=_METADATA_SECONDS) as answer:
            return str(answer.read(100).decode("ascii"))
    except (OSError, ValueError, urllib.error.URLError):
        return ""


def _place(machine: Machine) -> list[Finding]:
    findings = [ok("place", "; ".join(_kinds(machine)))]
    source = instance_type(machine)
    if machine.instance is not None:
        who = f", says {source.said_by}" if source.instance_type == machine.instance.name else " (--expect)"
        findings.append(ok("instance type", f"{machine.instance.name}{who}"))
    elif source.instance_type:
        found = f"{source.instance_type}, says {source.said_by}: the catalog has no such GPU instance"
        findings.append(ok("instance type", found))
    else:
        findings.append(ok("instance type", "unknown: not an EC2 instance, or it may not say"))
    return findings


def _kinds(machine: Machine) -> list[str]:
    """Every surrounding that is recognised; a HyperPod node is a Slurm node too."""
    variables = machine.environment
    kinds = []
    if machine.file("/opt/ml/input/config/resourceconfig.json").exists():
        job = variables.get("TRAINING_JOB_NAME", "")
        kinds.append(f"container of a SageMaker training job{f' ({job})' if job else ''}")
    if machine.file("/opt/sagemaker_cluster").is_dir():
        kinds.append("HyperPod node")
    if "KUBERNETES_SERVICE_HOST" in variables:
        kinds.append("Kubernetes pod")
    if "SLURM_JOB_ID" in variables:
        where = f"node {variables['SLURMD_NODENAME']}" if "SLURMD_NODENAME" in variables else "a shell"
        kinds.append(f"Slurm job {variables['SLURM_JOB_ID']}, {where}")
    elif not ask(machine, ["sinfo", "--version"]).trouble:
        kinds.append("machine with Slurm's commands (login node)")
    return kinds or ["plain machine: no SageMaker, HyperPod, Kubernetes or Slurm seen"]


def parse_sinfo(text: str) -> tuple[str, list[str]]:
    """(one line that describes the cluster, nodes that cannot be used) of `sinfo --noheader --format='%P|%D|%t|%G'`."""
    partitions: dict[str, dict[str, int]] = {}
    ill = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split("|")]
        if len(values) != 4 or not values[1].isdigit():
            continue
        name, number, state, resources = values
        kind = "no GPUs" if resources in ("(null)", "") else resources
        sizes = partitions.setdefault(name.rstrip("*"), {})
        sizes[kind] = sizes.get(kind, 0) + int(number)
        if state.rstrip("*~#!%$@^-+").lower().startswith(_ILL_STATES):
            ill.append(f"{number} {state} in {name.rstrip('*')}")
    parts = [
        f"{name}: {', '.join(f'{number} nodes with {kind}' for kind, number in sizes.items())}"
        for name, sizes in partitions.items()
    ]
    return "; ".join(parts), ill


def _slurm(machine: Machine) -> list[Finding]:
    answer: Answer = ask(machine, ["sinfo", "--noheader", f"--format={_SINFO_FORMAT}"])
    if answer.trouble.endswith("is not installed"):
        return []
    if answer.trouble:
        said = "is slurmctld up, and SLURM_CONF or /etc/slurm/slurm.conf right? Without a cluster: nothing to do"
        return [warn("slurm", answer.trouble, said)]
    described, ill = parse_sinfo(answer.text)
    if ill:
        fix = "scontrol show node NODE says why; scontrol update node=NODE state=resume when it is mended"
        return [warn("slurm", f"{described}; not usable: {', '.join(ill)}", fix)]
    return [ok("slurm", described or "no partitions")]


CHECKS = (Check("place", _place), Check("slurm", _slurm))
