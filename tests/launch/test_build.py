"""From what a person asked for to a job: names, flags and variables, checked before anything waits in a queue."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hypershard.catalog.instances import instance
from hypershard.cli.train import build_parser, resolve_arguments
from hypershard.config.flags import parse
from hypershard.errors import ConfigError, StorageError
from hypershard.launch.build import build_job
from hypershard.launch.environment import environment_for
from hypershard.launch.job import Job, Resources
from hypershard.models.files import available_models

ASKED: dict[str, Any] = {
    "train_flags": (),
    "model_name": "llama3_8b",
    "instance": "p5",
    "num_nodes": 4,
    "run_dir": "/fsx/run",
    "hours": 24.0,
    "image": None,
    "max_restarts": 3,
    "name": None,
    "extra_environment": {},
}


def job_of(**changes: Any) -> Job:
    return build_job(**{**ASKED, **changes})


def test_a_whole_job() -> None:
    job = job_of(train_flags=("--train_batch_size", "2", "--compile"), instance="ml.p5.48xlarge", image="repo/image:1")
    assert job == Job(
        name="llama3-8b-p5-x4",
        train_flags=(
            "--model=llama3_8b",
            "--train_batch_size",
            "2",
            "--compile",
            "--run_dir=/fsx/run",
            "--resume_from_checkpoint=auto",
        ),
        environment=environment_for(instance("p5"), run_dir="/fsx/run"),
        resources=Resources(instance_type="p5.48xlarge", num_nodes=4, gpus_per_node=8, efa_interfaces=32),
        run_dir="/fsx/run",
        hours=24.0,
        max_restarts=3,
        image="repo/image:1",
    )


def test_nodes_that_the_catalog_does_not_know() -> None:
    job = job_of(instance=None, model_name="tiny_llama", num_nodes=2)
    assert job.resources == Resources(instance_type="", num_nodes=2, gpus_per_node=0, efa_interfaces=0)
    assert job.environment == environment_for(None, run_dir="/fsx/run")
    assert job.name == "tiny-llama-cpu-x2"


@pytest.mark.parametrize("model", available_models())
def test_every_model_makes_a_name_that_every_cluster_takes(model: str) -> None:
    job = job_of(model_name=model, instance="p6-b300", num_nodes=1024)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*-p6-b300-x1024", job.name)
    assert len(job.name) <= 50


@pytest.mark.parametrize("model", available_models())
def test_training_takes_the_jobs_flags(model: str) -> None:
    job = job_of(model_name=model, train_flags=["--train_batch_size", "2"])
    resolved, name = resolve_arguments(parse(build_parser(), job.train_flags))
    assert name == model
    assert resolved.config.data.train_batch_size == 2
    assert resolved.config.report.run_dir == "/fsx/run"
    assert resolved.config.checkpoint.resume_from_checkpoint == "auto"


def test_a_login_node_needs_no_torch() -> None:
    code = "import sys, hypershard.launch.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"name": "mine"}, "mine"),
        ({"train_flags": ["--run_name=My run (2)"]}, "My-run-2-p5-x4"),
        ({"train_flags": ["--config=s3://bucket/my_run.yaml"], "model_name": None}, "my-run-p5-x4"),
    ],
)
def test_where_a_name_comes_from(changes: dict[str, Any], name: str) -> None:
    assert job_of(**changes).name == name


def test_a_name_that_no_cluster_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--run_name=my_run"):
        job_of(name="my_run")


def test_a_model_may_stand_among_the_flags(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("hidden_width: 64\n")
    job = job_of(model_name=None, train_flags=["--model", str(file)])
    assert job.train_flags[:2] == ("--model", str(file))
    assert job.name == "mine-p5-x4"
    assert job_of(train_flags=["--model=llama3_8b"]).train_flags.count("--model=llama3_8b") == 1
    with pytest.raises(ConfigError, match="found another model"):
        job_of(train_flags=["--model=llama2_7b"])


def test_a_job_goes_on_where_it_stopped() -> None:
    assert job_of().train_flags[-1] == "--resume_from_checkpoint=auto"
    bare = job_of(train_flags=["--resume_from_checkpoint", "--compile"])
    assert bare.train_flags.count("--resume_from_checkpoint") == 1
    assert "--resume_from_checkpoint=auto" not in bare.train_flags


@pytest.mark.parametrize("source", ["/fsx/other", "none"])
def test_a_job_does_not_go_back_to_another_run_at_every_restart(source: str) -> None:
    with pytest.raises(ConfigError, match="every restart"):
        job_of(train_flags=[f"--resume_from_checkpoint={source}"])


def test_an_evaluation_may_read_another_run() -> None:
    flags = ("--eval_only", "--resume_from_checkpoint=/fsx/other")
    assert job_of(train_flags=flags).train_flags[1:3] == flags


def test_a_users_variables_go_first() -> None:
    job = job_of(extra_environment={"NCCL_DEBUG": "INFO", "MINE": "1"})
    assert job.environment == {**environment_for(instance("p5"), run_dir="/fsx/run"), "NCCL_DEBUG": "INFO", "MINE": "1"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train_flags": ["--nproc_per_node=8"]}, "--nproc_per_node: a job does not take this flag"),
        ({"train_flags": ["--nproc_per_node", "8"]}, "--nproc_per_node"),
        ({"train_flags": ["--run_dir=/tmp/x"]}, "--run_dir: a job does not take this flag"),
        ({"train_flags": ["--show_config"]}, "--show_config"),
        ({"train_flags": ["--hidden_widht=4"]}, "unknown flag --hidden_widht; did you mean --hidden_width?"),
        ({"train_flags": ["--mdoel=x"]}, "did you mean --model?"),
        ({"train_flags": ["--help"]}, "unknown flag --help"),
        ({"train_flags": ["llama3_8b"]}, "unexpected word 'llama3_8b'"),
        ({"train_flags": ["--lr=fast"]}, "--lr: found 'fast', expected a number"),
        ({"train_flags": ["--lr"]}, "--lr: expected one argument"),
        ({"train_flags": ["--train_batch_size=0"]}, "expected at least 1"),
        ({"train_flags": ["--lr=1\n--compile"]}, "--lr"),
        ({"model_name": "llama3_9b"}, "--model=llama3_9b: no model file of this name; did you mean"),
        ({"model_name": "/nowhere/x.yaml"}, "there is no such file"),
        ({"instance": "p3.8xlarge"}, "refused"),
        ({"instance": "p7"}, "--instance=p7"),
        ({"num_nodes": 0}, "--nodes=0"),
        ({"hours": 0.0}, "--hours=0"),
        ({"hours": float("inf")}, "--hours=inf"),
        ({"hours": float("nan")}, "--hours=nan"),
        ({"max_restarts": -1}, "--max_restarts=-1"),
        ({"run_dir": ""}, "--run_dir: found nothing"),
        ({"extra_environment": {"NCCL_TIMEOUT": "3600"}}, "environment variable NCCL_TIMEOUT"),
        ({"extra_environment": {"HF_TOKEN": "hf_x"}}, "environment variable HF_TOKEN"),
        ({"extra_environment": {"A B": "1"}}, "environment variable 'A B'"),
    ],
)
def test_what_could_not_train_is_refused_before_it_waits(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(**changes)
    assert part in str(caught.value)


def test_a_run_directory_is_no_bucket() -> None:
    with pytest.raises(StorageError, match="--run_dir=s3://bucket/run"):
        job_of(run_dir="s3://bucket/run")


def test_a_home_directory_is_written_out() -> None:
    """Neither a quoted word in a script nor torch knows what ~ means."""
    job = job_of(run_dir="~/runs/a/")
    assert job.run_dir == str(Path.home() / "runs" / "a")
    assert f"--run_dir={job.run_dir}" in job.train_flags
    assert job.environment["TORCH_FR_DUMP_TEMP_FILE"].startswith(job.run_dir + "/")
