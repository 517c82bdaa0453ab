"""A job's manifests: valid by Kubernetes' schema, whole for a cluster, refused where one would lose the run."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypershard.catalog.instances import instances
from hypershard.cli.launch import run as launch
from hypershard.errors import ConfigError
from hypershard.launch.build import build_job
from hypershard.launch.kubernetes import HYPERPOD_JOB, JOB, KINDS, KubernetesOptions, render
from hypershard.launch.surroundings import find_place

IMAGE = "111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1"


def manifests(
    *,
    instance: str | None = "p5",
    num_nodes: int = 4,
    flags: Sequence[str] = ("--lr=3e-4",),
    name: str | None = None,
    image: str | None = IMAGE,
    run_dir: str = "/fsx/runs/one",
    **options: Any,
) -> list[dict[str, Any]]:
    job = build_job(
        train_flags=flags,
        model_name="llama3_8b",
        instance=instance,
        num_nodes=num_nodes,
        run_dir=run_dir,
        hours=12.5,
        image=image,
        max_restarts=3,
        name=name,
        extra_environment={},
    )
    settings: dict[str, Any] = {
        "kind": JOB,
        "volumes": (("fsx-claim", "/fsx"),),
        "namespace": None,
        "hyperpod": False,
        "queue": None,
        "priority": None,
        "service_account": None,
    }
    return list(yaml.safe_load_all(render(job, KubernetesOptions(**{**settings, **options}))))


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    spec = job["spec"]
    pod: dict[str, Any] = (spec["replicaSpecs"][0] if job["kind"] == HYPERPOD_JOB else spec)["template"]["spec"]
    return pod


def variables(job: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod_of(job)["containers"][0]["env"]}


def test_an_indexed_job_has_a_pod_for_each_node_that_finds_the_first(tmp_path: Path) -> None:
    service, job = manifests()
    spec, pod = job["spec"], pod_of(job)
    assert (job["apiVersion"], spec["completionMode"]) == ("batch/v1", "Indexed")
    assert spec["completions"] == spec["parallelism"] == 4 and spec["activeDeadlineSeconds"] == 45000
    assert pod["subdomain"] == service["metadata"]["name"], "or the pods' names would not resolve"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    # What the entrypoint makes of it, in the pod of index 3.
    place = find_place({**variables(job), "JOB_COMPLETION_INDEX": "3"}, ml=tmp_path)
    name = job["metadata"]["name"]
    assert (place.num_nodes, place.node_rank, place.main_host) == (4, 3, f"{name}-0.{name}")


def test_a_pod_has_the_nodes_devices_memory_and_disk() -> None:
    _, job = manifests()
    pod = pod_of(job)
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "vpc.amazonaws.com/efa": 32}
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1024Gi"}
    assert volumes[mounts["/fsx"]]["persistentVolumeClaim"] == {"claimName": "fsx-claim"}
    assert container["image"] == IMAGE and "command" not in container, "the image's entrypoint is process 1"
    assert container["args"][0] == "train" and "--max_restarts=3" in container["args"]
    assert {"--lr=3e-4", "--run_dir=/fsx/runs/one", "--resume_from_checkpoint=auto"} <= set(container["args"])


def test_a_user_error_ends_the_job_a_stop_and_an_eviction_cost_no_start() -> None:
    _, job = manifests()
    spec, pod = job["spec"], pod_of(job)
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2, 3]), ("Ignore", [143]), ("Ignore", None)]
    assert pod["restartPolicy"] == "Never", "as podFailurePolicy wants"
    assert spec["backoffLimit"] == 3 * 4, "one failure is one of each pod"
    assert pod["terminationGracePeriodSeconds"] > int(variables(job)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def test_hyperpods_operator_gets_a_job_of_its_own() -> None:
    (job,) = manifests(kind=HYPERPOD_JOB, queue="hyperpod-ns-team-localqueue", priority="high", namespace="team")
    container = pod_of(job)["containers"][0]
    assert job["apiVersion"] == "sagemaker.amazonaws.com/v1" and job["spec"]["nprocPerNode"] == "8"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "hyperpod-ns-team-localqueue"
    assert job["spec"]["replicaSpecs"][0]["replicas"] == 4
    assert container["command"][0] == "hyperpodrun" and "--shutdown-signal=SIGTERM" in container["command"]
    assert not any(word.startswith("--max_restarts") for word in container["command"]), "the operator restarts"
    selector = pod_of(job)["nodeSelector"]
    assert selector["node.kubernetes.io/instance-type"] == "ml.p5.48xlarge"
    assert "--resume_from_checkpoint=auto" in container["command"]


@pytest.mark.parametrize("row", instances(), ids=lambda row: row.name)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instance_can_be_asked_for(row: Any, kind: str) -> None:
    job = manifests(instance=row.name, kind=kind)[-1]
    limits = pod_of(job)["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == row.num_gpus and limits.get("vpc.amazonaws.com/efa", 0) == row.efa_interfaces


def test_nodes_without_gpus_ask_for_none() -> None:
    _, job = manifests(instance=None, num_nodes=2)
    pod = pod_of(job)
    assert not pod["containers"][0]["resources"] and "nodeSelector" not in pod and "tolerations" not in pod


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "--image: found none"),
        ({"name": "Llama3"}, "--name=Llama3: expected lower-case"),
        ({"name": "3b"}, "a letter first"),
        ({"name": "a" * 62}, "at most 61 characters"),
        ({"run_dir": "/runs/one"}, "--run_dir=/runs/one: it would end with its pod"),
        ({"run_dir": "/fsx2/one"}, "it would end with its pod"),
        ({"volumes": ()}, "found none"),
        ({"volumes": (("fsx", "fsx"),)}, "--volume fsx:fsx: expected an absolute path"),
        ({"volumes": (("FSX claim", "/fsx"),)}, "--volume=FSX claim: expected lower-case"),
        ({"namespace": "a b"}, "--namespace=a b"),
        ({"queue": "a\nb: c"}, "--queue=a"),
        ({"kind": "PyTorchJob"}, "--kind=PyTorchJob: expected one of Job, HyperPodPyTorchJob"),
    ],
)
def test_what_a_cluster_would_refuse_or_lose_is_refused_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manifests(**changes)


def test_values_stay_texts_whatever_they_look_like() -> None:
    """YAML takes yes, 1e3 and null for other things than texts; a shell would take $(…) for a command."""
    words = ["--run_name=yes", "--dataset=/fsx/$(HOME) `x` \"q\" 'a': #b"]
    _, job = manifests(flags=words)
    args = pod_of(job)["containers"][0]["args"]
    assert args[2:4] == [words[0], words[1].replace("$(", "$$(")], "Kubernetes itself puts variables into $(NAME)"
    assert all(isinstance(value, str) for value in variables(job).values())


@pytest.mark.parametrize("instance", ["p5", "g5", None])
def test_the_manifests_follow_kubernetes_schema(instance: str | None) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in manifests(instance=instance):
        validate.validate(document, validate.latest_version(), strict=True)


def test_the_command_line_prints_writes_and_needs_kubectl_to_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["kubernetes", "--model=llama3_8b", "--instance=p5", "--nodes=2", f"--image={IMAGE}", "--lr=3e-4"]
    words += ["--volume=fsx-claim:/fsx", "--run_dir=/fsx/runs/one", "--environment=NCCL_DEBUG=INFO"]
    assert launch([*words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    job = list(yaml.safe_load_all(printed))[1]
    assert variables(job)["NCCL_DEBUG"] == "INFO"
    assert launch([*words, "--write", str(tmp_path / "jobs/job.yaml")]) == 0
    assert (tmp_path / "jobs/job.yaml").read_text() == printed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="found no kubectl"):
        launch(words)
    # A kubectl that says what it was given: manifests on standard input.
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\n[ "$*" = "apply -f -" ] && /bin/cat > {tmp_path}/applied && echo created\n')
    kubectl.chmod(0o755)
    capsys.readouterr()
    assert launch(words) == 0 and capsys.readouterr().out == "created\n"
    assert (tmp_path / "applied").read_text() == printed


def test_the_launcher_script_is_the_verb() -> None:
    script = Path(__file__).parents[2] / "launchers" / "kubernetes.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "hypershard launch kubernetes" in done.stdout


def test_files_that_pods_do_not_see_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, run_file = tmp_path / "a.jinja", tmp_path / "run.yaml"
    template.write_text("{{ messages }}")
    run_file.write_text(f"chat_template: {template}\n")
    words = ["kubernetes", "--model=tiny_llama", "--run_dir=/fsx/run", f"--image={IMAGE}", "--dry_run"]
    for named in (f"--chat_template={template}", f"--config={run_file}"):
        for more, is_warned in (([], True), ([f"--volume=mine:{tmp_path}"], False)):
            assert launch([*words, "--volume=fsx:/fsx", *more, named]) == 0
            assert (f"--chat_template={template} is a path of this machine" in capsys.readouterr().err) == is_warned
