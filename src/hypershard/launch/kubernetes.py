"""A job as Kubernetes manifests: an Indexed Job with a headless Service, or a HyperPodPyTorchJob.

    Job, Indexed           one pod per node; pod i is <name>-<i>.<name>, runs the image's entrypoint (launch/start.py)
    Service, headless      makes those names resolvable, before the pods are ready too
    HyperPodPyTorchJob     of HyperPod's training operator: its agent `hyperpodrun` stands in for torchrun

Nodes fail together: the pods of one start meet, and end when one of them does (launch/links.py), so one lost node
costs one failure of each pod.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..catalog.instances import Instance
from ..catalog.instances import instance as find_instance
from ..errors import ConfigError
from .job import Job
from .start import SHUTDOWN_SECONDS

JOB, HYPERPOD_JOB = "Job", "HyperPodPyTorchJob"
KINDS = (JOB, HYPERPOD_JOB)
USER_ID = 1000  # of the image (docker/Dockerfile); files on a shared file system belong to it

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # a Service's name must begin with a letter
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LONGEST_NAME = 63  # of a pod's host name, which ends in its number
_CONTAINER = "trainer"
_HYPERPOD_ENTRY = "/opt/hypershard/train.py"  # src/train.py in the image
_USER_ERRORS = [2, 3]  # exit codes by which the job fails for good: a user's error, a diverged training (errors.py)
_STOPPED = [143]  # saved and ended on a signal: another pod goes on
_QUIET_SECONDS = 1800  # without a line about a step HyperPod's operator takes a job for hung: saves and validations


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What a cluster needs to know besides the job.

    `kind`: one of KINDS. `volumes`: (persistent volume claim, where it is mounted); one must hold the run directory.
    `hyperpod`: nodes are HyperPod's, which name their type ml.… and mark sick ones. `queue`, `priority`: of Kueue.
    """

    kind: str
    volumes: tuple[tuple[str, str], ...]
    namespace: str | None
    hyperpod: bool
    queue: str | None
    priority: str | None
    service_account: str | None


def render(job: Job, options: KubernetesOptions) -> str:
    """The manifests as YAML for `kubectl apply -f`. Raises ConfigError for what a cluster would refuse or lose."""
    import yaml

    _check(job, options)
    if options.kind == HYPERPOD_JOB:
        documents = [_hyperpod_job(job, options)]
    else:
        documents = [_service(job, options), _indexed_job(job, options)]
    return _header(job, options) + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _header(job: Job, options: KubernetesOptions) -> str:
    lines = [f"kubectl apply -f FILE; then kubectl logs -f {options.kind.lower()}/{job.name}"]
    if options.kind == HYPERPOD_JOB:
        lines = [
            "kubectl apply -f FILE on a HyperPod cluster with the training operator.",
            "The image must hold hyperpod-elastic-agent beside hypershard; the agent 1.1.3 takes torch below 2.12.",
        ]
    return "".join(f"# {line}\n" for line in lines)


def _check(job: Job, options: KubernetesOptions) -> None:
    if options.kind not in KINDS:
        raise ConfigError(f"--kind={options.kind}: expected one of {', '.join(KINDS)}")
    if job.image is None:
        raise ConfigError("--image: found none; expected the container image that the cluster pulls, REGISTRY/NAME:TAG")
    longest = _LONGEST_NAME - len(f"-{job.resources.num_nodes - 1}")
    if not _NAME.fullmatch(job.name) or len(job.name) > longest:
        raise ConfigError(
            f"--name={job.name}: expected lower-case letters, digits and hyphens, a letter first, at most {longest} "
            f"characters: the pods' names are made of it"
        )
    names = {"--namespace": options.namespace, "--service_account": options.service_account}
    labels = {"--queue": options.queue, "--priority": options.priority}
    claims = [("--volume", claim) for claim, _ in options.volumes]
    for flag, name in (*names.items(), *claims):
        if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
            raise ConfigError(f"{flag}={name}: expected lower-case letters, digits and hyphens")
    for flag, label in labels.items():
        if label is not None and not _LABEL.fullmatch(label):
            raise ConfigError(f"{flag}={label}: expected letters, digits, '-', '_' and '.', at most 63")
    for claim, path in options.volumes:
        if not path.startswith("/") or PurePosixPath(path) == PurePosixPath("/") or ":" in path:
            raise ConfigError(f"--volume {claim}:{path}: expected an absolute path to mount it at, such as /fsx")
    if not any(PurePosixPath(job.run_dir).is_relative_to(path) for _, path in options.volumes):
        mounted = ", ".join(path for _, path in options.volumes) or "none"
        raise ConfigError(
            f"--run_dir={job.run_dir}: it would end with its pod; expected a folder on a volume that all pods mount "
            f"(found {mounted}): add --volume CLAIM:/PATH"
        )


def _metadata(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"name": job.name}
    if options.namespace is not None:
        found["namespace"] = options.namespace
    found["labels"] = _labels(job)
    if options.queue is not None:
        found["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    if options.priority is not None:
        found["labels"]["kueue.x-k8s.io/priority-class"] = options.priority
    return found


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hypershard", "app.kubernetes.io/instance": job.name}


def _service(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    metadata = _metadata(job, options)
    metadata["labels"] = _labels(job)  # a Service waits in no queue
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the nodes look for each other before any of them is ready
            "selector": _labels(job),
            "ports": [{"name": "rendezvous", "port": 29400}],
        },
    }


def _indexed_job(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    num_nodes = job.resources.num_nodes
    container = _container(job, options)
    container["args"] = ["train", *_literal(job.train_flags), f"--max_restarts={job.max_restarts}"]
    container["env"] = [
        {"name": "HYPERSHARD_NUM_NODES", "value": str(num_nodes)},
        {"name": "HYPERSHARD_MAIN_HOST", "value": f"{job.name}-0.{job.name}"},
        *container["env"],
    ]
    on_exit = {"containerName": _CONTAINER, "operator": "In"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, options),
        "spec": {
            "completionMode": "Indexed",
            "completions": num_nodes,
            "parallelism": num_nodes,
            "backoffLimit": job.max_restarts * num_nodes,  # pods: all of them fail when one does
            "activeDeadlineSeconds": round(job.hours * 3600),
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": {**on_exit, "values": _USER_ERRORS}},
                    {"action": "Ignore", "onExitCodes": {**on_exit, "values": _STOPPED}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "metadata": {"labels": _labels(job)},
                "spec": {"subdomain": job.name, "restartPolicy": "Never", **_pod(job, options, container)},
            },
        },
    }


def _hyperpod_job(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    ranks, num_nodes = max(1, job.resources.gpus_per_node), job.resources.num_nodes
    container = _container(job, options)
    container["command"] = [
        "hyperpodrun",
        f"--nnodes={num_nodes}",
        f"--nproc_per_node={ranks}",
        "--tee=3",
        "--log_dir=/tmp/hyperpod",  # where the operator's log monitor reads
        "--shutdown-signal=SIGTERM",  # else ranks are killed without a save
        f"--shutdown-timeout={_shutdown_seconds(job)}",
        _HYPERPOD_ENTRY,
        *_literal(job.train_flags),
    ]
    pattern = r".*step \d+/.*"
    return {
        "apiVersion": "sagemaker.amazonaws.com/v1",
        "kind": HYPERPOD_JOB,
        "metadata": _metadata(job, options),
        "spec": {
            "nprocPerNode": str(ranks),
            "runPolicy": {
                "jobMaxRetryCount": job.max_restarts,
                "cleanPodPolicy": "None",
                "logMonitoringConfiguration": [
                    {"name": "JobStart", "logPattern": pattern, "expectedStartCutOffInSeconds": _QUIET_SECONDS},
                    {"name": "JobHang", "logPattern": pattern, "expectedRecurringFrequencyInSeconds": _QUIET_SECONDS},
                ],
            },
            "replicaSpecs": [
                {
                    "name": "pods",
                    "replicas": num_nodes,
                    "template": {"metadata": {"labels": _labels(job)}, "spec": _pod(job, options, container)},
                }
            ],
        },
    }


def _literal(words: Iterable[str]) -> list[str]:
    """Kubernetes puts a variable's value where an argument says $(NAME), unless the $ is doubled."""
    return [word.replace("$(", "$$(") for word in words]


def _shutdown_seconds(job: Job) -> int:
    return int(job.environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS))


def _pod(job: Job, options: KubernetesOptions, container: dict[str, Any]) -> dict[str, Any]:
    row = _row(job)
    is_hyperpod = options.hyperpod or options.kind == HYPERPOD_JOB
    shared_memory: dict[str, Any] = {"medium": "Memory"}
    if row is not None:
        shared_memory["sizeLimit"] = f"{row.ram_gib // 2}Gi"  # as Linux has it; memory checkpoints lie there
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": _shutdown_seconds(job) + 20,  # and the entrypoint's own end
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",  # not file by file at each start
        },
        "containers": [container],
        "volumes": [
            {"name": "shared-memory", "emptyDir": shared_memory},
            *(
                {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
                for number, (claim, _) in enumerate(options.volumes)
            ),
        ],
    }
    if options.service_account is not None:
        pod["serviceAccountName"] = options.service_account
    if row is not None:
        pod["nodeSelector"] = {
            "node.kubernetes.io/instance-type": row.sagemaker_name if is_hyperpod else row.name,
            **({"sagemaker.amazonaws.com/node-health-status": "Schedulable"} if is_hyperpod else {}),
        }
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _container(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    return {
        "name": _CONTAINER,
        "image": job.image,
        "env": [{"name": name, "value": _literal([value])[0]} for name, value in job.environment.items()],
        "resources": _resources(job),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *({"name": f"volume-{number}", "mountPath": path} for number, (_, path) in enumerate(options.volumes)),
        ],
    }


def _resources(job: Job) -> dict[str, Any]:
    """Devices are asked for by limits, which are requests too. Half the node's cores and memory keep other jobs off.

    No huge pages: the job's environment turns EFA's off.
    """
    row = _row(job)
    limits: dict[str, Any] = {}
    if job.resources.gpus_per_node:
        limits["nvidia.com/gpu"] = job.resources.gpus_per_node
    if job.resources.efa_interfaces:
        limits["vpc.amazonaws.com/efa"] = job.resources.efa_interfaces
    requests = {} if row is None else {"cpu": row.num_vcpus // 2, "memory": f"{row.ram_gib // 2}Gi"}
    return {name: value for name, value in (("limits", limits), ("requests", requests)) if value}


def _row(job: Job) -> Instance | None:
    return find_instance(job.resources.instance_type) if job.resources.instance_type else None
