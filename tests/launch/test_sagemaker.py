"""The request of a training job: what it holds, what is refused before it is sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hypershard.catalog.instances import families, instances
from hypershard.cli import train
from hypershard.config.schema import Config
from hypershard.config.sources import parse_yaml
from hypershard.errors import ConfigError
from hypershard.launch.build import build_job
from hypershard.launch.job import Job
from hypershard.launch.sagemaker import METRICS, RUN_DIR, Options, Submission, create_training_job_request
from hypershard.launch.sagemaker_environment import flags_of
from hypershard.launch.validate import violations
from hypershard.metrics.display import describe

ROLE = "arn:aws:iam::111122223333:role/train"
IMAGE = "111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1"
ROOT = Path(__file__).parents[2]


def job(*flags: str, **changes: Any) -> Job:
    wanted: dict[str, Any] = {
        "model_name": "llama3_8b",
        "instance": "p5",
        "num_nodes": 4,
        "run_dir": RUN_DIR,
        "hours": 24.0,
        "image": IMAGE,
        "max_restarts": 0,
        "name": "demo",
        "extra_environment": {},
        **changes,
    }
    return build_job(train_flags=flags, **wanted)


def submission(*flags: str, options: Mapping[str, Any] | None = None, **changes: Any) -> Submission:
    given = {"role": ROLE, "output": "s3://bucket/runs", **(options or {})}
    return create_training_job_request(job(*flags, **changes), Options(**given))


def settings(made: Submission) -> dict[str, str]:
    """The flags that the container makes of the hyperparameters."""
    words = flags_of(made.request["HyperParameters"])
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def test_a_plain_job() -> None:
    made = submission("--lr=3e-4", "--bf16")
    request = made.request
    assert made.files == {}
    assert request["TrainingJobName"] == "demo"
    assert request["RoleArn"] == ROLE
    assert request["ResourceConfig"] == {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 4}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 24 * 3600}
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    assert request["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    assert "ContainerEntrypoint" not in request["AlgorithmSpecification"]
    assert request["Environment"]["FI_EFA_USE_HUGE_PAGE"] == "0"
    assert {"InputDataConfig", "CheckpointConfig", "VpcConfig", "RetryStrategy", "Tags"}.isdisjoint(request)
    assert settings(made) == {
        "model": "llama3_8b",
        "lr": "3e-4",
        "bf16": "1",
        "run_dir": RUN_DIR,
        "resume_from_checkpoint": "auto",
        "s3_tier_base_path": "s3://bucket/runs/demo/checkpoints",
        "checkpoint_freq": "0",
    }


@pytest.mark.parametrize("name", [row.name for row in instances()])
def test_every_instance_of_the_catalog_gives_a_request_that_aws_takes(name: str) -> None:
    request = submission(instance=name, num_nodes=2).request
    assert request["ResourceConfig"]["InstanceType"] == f"ml.{name}"
    assert not violations(request, "CreateTrainingJob", service="sagemaker")
    assert any("EFA" in variable for variable in request["Environment"]) == (
        next(row for row in instances() if row.name == name).efa_interfaces > 0
    )


def test_everything_that_can_be_asked_for() -> None:
    request = submission(
        "--dataset=/opt/ml/input/data/fsx/bins",
        max_restarts=3,
        options={
            "channels": {"fsx": "fsx://fs-0123456789abcdef0/mount/data", "tokenizer": "s3://bucket/tokenizer"},
            "sync_run_dir": True,
            "spot": True,
            "max_wait_hours": 72,
            "volume_gb": 100,
            "subnets": ("subnet-1", "subnet-2"),
            "security_groups": ("sg-1",),
            "tags": {"team": "research"},
        },
    ).request
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] == 72 * 3600
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    assert request["HyperParameters"]["max_restarts"] == "3"
    assert request["CheckpointConfig"] == {"S3Uri": "s3://bucket/runs/demo/run", "LocalPath": RUN_DIR}
    assert request["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert request["Tags"] == [{"Key": "team", "Value": "research"}]
    lustre, tokenizer = request["InputDataConfig"]
    assert lustre["DataSource"]["FileSystemDataSource"]["DirectoryPath"] == "/mount/data"
    assert tokenizer["InputMode"] == "FastFile"


def test_a_warm_pool_is_kept_in_seconds() -> None:
    request = submission(options={"warm_pool_minutes": 30}).request
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1800


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"role": None}, ("RoleArn", "--role")),
        ({}, {"role": "train"}, ("RoleArn", "--role", "20")),
        ({}, {"output": None}, ("--output", "s3://bucket/prefix")),
        ({}, {"output": "/fsx/out"}, ("--output", "/fsx/out")),
        ({"image": None}, {}, ("--image",)),
        ({"image": "x" * 256}, {}, ("TrainingImage", "255", "--image")),
        ({"instance": None}, {}, ("--instance",)),
        ({"instance": "p9"}, {}, ("--instance", "p9")),
        ({"hours": 673.0}, {}, ("--hours=673", "672")),
        ({"max_restarts": 31}, {}, ("MaximumRetryAttempts", "30", "--max_restarts")),
        ({"extra_environment": {"A": "x" * 513}}, {}, ("Environment.A", "513", "--environment")),
        ({}, {"warm_pool_minutes": 361}, ("KeepAlivePeriodInSeconds", "21600", "--warm_pool_minutes")),
        ({}, {"warm_pool_minutes": 10, "spot": True}, ("--warm_pool_minutes", "--spot")),
        ({}, {"max_wait_hours": 30}, ("--max_wait_hours", "--spot")),
        ({}, {"max_wait_hours": 10, "spot": True}, ("--max_wait_hours=10", "--hours=24")),
        ({}, {"subnets": ("subnet-1",)}, ("--security_group",)),
        ({}, {"channels": {"train": "/data"}}, ("--channel train", "/data")),
        ({}, {"channels": {"train": "fsx://fs-0123456789abcdef0/a"}}, ("--channel train", "--subnet")),
        ({}, {"channels": {"bins": "s3://bucket/bins"}}, ("--channel bins", "--dataset=/opt/ml/input/data/bins")),
        ({}, {"checkpoint_s3": "/fsx"}, ("--checkpoint_s3", "/fsx")),
    ],
)
def test_what_cannot_be_is_refused_here(changes: Any, options: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        submission(options=options, **changes)
    for word in words:
        assert word in str(caught.value)


def test_a_channel_beside_the_flag_that_it_becomes_is_refused() -> None:
    channels = {"train": "s3://bucket/bins"}
    assert "dataset" not in settings(submission(options={"channels": channels}))  # the container names the folder
    submission("--dataset=/opt/ml/input/data/train/part", options={"channels": channels})
    with pytest.raises(ConfigError, match="found another --dataset"):
        submission("--dataset=s3://other/bins", options={"channels": channels})


def test_a_channel_goes_before_a_run_file_as_its_flag_does(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("init_from: org/model\n")
    made = submission(f"--config={path}", "--lr=1e-3", options={"channels": {"model": "s3://bucket/weights"}})
    assert made.files == {}, "nothing is left to say in the file"
    with pytest.raises(ConfigError, match="found another --config"):
        submission(f"--config={path}", options={"channels": {"config": "s3://bucket/run"}})


def test_checkpoints_must_outlive_the_hosts() -> None:
    own = submission("--s3_tier_base_path=s3://other/place")
    assert settings(own)["s3_tier_base_path"] == "s3://other/place"
    with pytest.raises(ConfigError, match="give one of them"):
        submission("--s3_tier_base_path=s3://other/place", options={"checkpoint_s3": "s3://third/place"})
    with pytest.raises(ConfigError, match="--checkpoint_freq=50: hosts share no disk"):
        submission("--checkpoint_freq=50")
    shared = submission("--checkpoint_freq=50", "--checkpoint_dir=/opt/ml/input/data/fsx/run")
    assert settings(shared)["checkpoint_freq"] == "50"


def test_a_run_file_of_this_machine_goes_to_s3(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny_llama\nmax_steps: 7\nlr: 1e-3\n")
    made = submission(f"--config={path}", "--lr=3e-4", model_name=None)
    assert re.fullmatch(r"s3://bucket/runs/demo/run-[0-9a-f]{12}\.yaml", settings(made)["config"])
    assert list(made.files) == [settings(made)["config"]]
    assert settings(made)["model"] == "tiny_llama"
    assert settings(made)["lr"] == "3e-4"  # a flag still, and flags win
    (content,) = made.files.values()
    assert parse_yaml(content.decode(), where="here") == ({"max_steps": 7, "lr": "1e-3"}, None)
    path.write_text("max_steps: 8\n")
    assert submission(f"--config={path}").files.keys() != made.files.keys()  # the first job still finds its own


def test_a_model_file_of_this_machine_goes_to_s3_below_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model_type: gpt2\nhidden_width: 64\nmax_context_width: 128\n")
    (tmp_path / "run.yaml").write_text("max_context_width: 32\n")
    flags = [f"--config={tmp_path / 'run.yaml'}"]
    made = submission(*flags, model_name=str(tmp_path / "mine.yaml"))
    assert "model" not in settings(made)
    (content,) = made.files.values()
    values, _ = parse_yaml(content.decode(), where="here")
    assert values == {"model_type": "gpt2", "hidden_width": 64, "max_context_width": 32}
    with pytest.raises(ConfigError, match="put its values into s3://bucket/run"):
        submission("--config=s3://bucket/run.yaml", model_name=str(tmp_path / "mine.yaml"))


def test_a_flag_that_is_too_long_for_a_hyperparameter_goes_to_s3() -> None:
    mixture = ",".join(f"s3://bucket/part-{number:04}:0.01" for number in range(100))
    made = submission(f"--dataset={mixture}", "--lr=3e-4")
    assert len(mixture) > 2500
    assert set(settings(made)) == {"model", "config"}
    values, _ = parse_yaml(next(iter(made.files.values())).decode(), where="here")
    assert values["dataset"] == mixture
    assert values["lr"] == "3e-4"
    with pytest.raises(ConfigError, match="--dataset has over 2500 characters"):
        submission(f"--dataset={mixture}", "--config=s3://bucket/run.yaml")


def test_the_job_trains_what_the_same_flags_train_here(tmp_path: Path) -> None:
    """By hyperparameters, and by a run file of texts."""
    here = ["--max_steps=60", "--lr=3e-4", "--bf16=0", "--activation_checkpointing=1", "--seed=7", "--run_name=x y"]
    long = f"--dataset={','.join(f's3://bucket/part-{number:04}:0.01' for number in range(100))}"
    short, filed = submission(*here, "--dataset=s3://bucket/bins"), submission(*here, long)
    (content,) = filed.files.values()
    (tmp_path / "run.yaml").write_bytes(content)
    words = [word for word in flags_of(filed.request["HyperParameters"]) if not word.startswith("--config=")]
    assert trained([*words, f"--config={tmp_path / 'run.yaml'}"]) == trained(["--model=llama3_8b", *here, long, *OURS])
    assert trained(flags_of(short.request["HyperParameters"])) == trained(
        ["--model=llama3_8b", *here, "--dataset=s3://bucket/bins", *OURS]
    )


OURS = (
    f"--run_dir={RUN_DIR}",
    "--resume_from_checkpoint",
    "--checkpoint_freq=0",
    "--s3_tier_base_path=s3://bucket/runs/demo/checkpoints",
)


def trained(words: list[str]) -> Config:
    """What `hypershard train` makes of these words."""
    return train.resolve_arguments(train.build_parser().parse_args(words))[0].config


def test_a_path_of_this_machine_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hypershard.log import setup_logging

    setup_logging()
    submission(f"--dataset={tmp_path}")
    assert f"--dataset={tmp_path} is a path of this machine" in capsys.readouterr().err


def test_a_chat_template_and_prompts_of_this_machine_go_with_the_job(tmp_path: Path) -> None:
    template, prompts, run_file = (tmp_path / name for name in ("whole.jinja", "ask.txt", "run.yaml"))
    template.write_text("{{ messages }}")
    prompts.write_text("Where?\n")
    run_file.write_text(f"validation_prompts: {prompts}\nvalidation_texts: 1\n")
    made = submission(f"--config={run_file}", f"--chat_template={template}", "--dataset=s3://bucket/chats")
    (channel,) = made.request["InputDataConfig"]
    folder = channel["DataSource"]["S3DataSource"]["S3Uri"]
    assert re.fullmatch(r"s3://bucket/runs/demo/files-[0-9a-f]{12}/", folder)
    for flag, source in (("chat_template", template), ("validation_prompts", prompts)):
        path = Path(settings(made)[flag])  # where the channel's files are mounted
        assert path.parent == Path("/opt/ml/input/data") / channel["ChannelName"]
        assert made.files[folder + path.name] == source.read_bytes()
    template.write_text("{{ messages[0] }}")
    again = submission(f"--chat_template={template}")
    assert not again.files.keys() & made.files.keys(), "the first job still finds its own"
    with pytest.raises(ConfigError, match="--channel run_files: jobs have a channel of this name"):
        submission(f"--chat_template={template}", options={"channels": {"run_files": "s3://bucket/a"}})
    with pytest.raises(ConfigError, match="--chat_template=s3://bucket/a: expected a file of this machine"):
        submission("--chat_template=s3://bucket/a")


def test_a_job_without_its_conversations_is_refused(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("data_kind: chat\n")
    with pytest.raises(ConfigError, match="--data_kind=chat: found no --dataset"):
        job(f"--config={run_file}")
    job(f"--config={run_file}", "--dataset=s3://bucket/chats")
    job(f"--config={run_file}", channels={"train": "s3://bucket/chats"})
    job("--data_kind=chat", "--config=s3://bucket/run.yaml")  # which may name them
    with pytest.raises(ConfigError, match="--data_kind=preference: found no --dataset"):
        job("--objective=dpo", channels={"model": "s3://bucket/weights"})


def record(**changes: Any) -> dict[str, Any]:
    whole = {"loss": 5.1234, "grad_norm": 1.21, "lr": 3e-4, "tokens_per_second": 812_345.0, "mfu": 0.412}
    return {**whole, "data_seconds": 0.5, "step_seconds": 2.0, "memory_bytes": 61.5 * 2**30, **changes}


def metrics(line: str) -> dict[str, float]:
    return {name: float(match[1]) for name, regex in METRICS.items() if (match := re.search(regex, line))}


def test_metrics_are_read_from_the_lines_that_training_prints() -> None:
    common = {"train:step": 12.0, "train:loss": 5.1234, "train:grad_norm": 1.21, "train:lr": 3e-4}
    found = metrics(describe(12, 60, record()))
    assert found == {
        **common,
        "train:thousand_tokens_per_second": 812.3,
        "train:mfu_percent": 41.2,
        "train:memory_gib": 61.5,
    }
    assert metrics(describe(12, 60, record(tokens_per_second=1.5e6)))["train:million_tokens_per_second"] == 1.5
    slow = metrics(describe(12, 60, record(tokens_per_second=512.0, mfu=None, memory_bytes=2**20)))
    assert slow == {**common, "train:tokens_per_second": 512.0}
    assert metrics(describe(12, 60, {"validation_loss": 4.5})) == {"validation:loss": 4.5}
    assert metrics("12:00:00 I going on after step 12 (1,000 tokens seen)") == {}


def test_families_as_functions() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from launchers import sagemaker
    finally:
        sys.path.remove(str(ROOT))
    assert {name.replace("_", "-") for name in dir(sagemaker)} == set(families())
    common = {
        "model": "llama3_8b",
        "nodes": 2,
        "hours": 1.0,
        "image": IMAGE,
        "role": ROLE,
        "output": "s3://bucket/runs",
    }
    request = sagemaker.p6_b200(**common, flags=["--lr=1e-4"]).request
    assert request["ResourceConfig"] == {"InstanceType": "ml.p6-b200.48xlarge", "InstanceCount": 2}
    with pytest.raises(AttributeError, match="no instance family"):
        _ = sagemaker.p9


def dry_run(*words: str) -> subprocess.CompletedProcess[str]:
    """The verb, in a process of its own that can import neither torch nor boto3, and has no AWS variables."""
    program = (
        "import sys; sys.modules.update(torch=None, boto3=None)\n"
        "from hypershard.cli.launch import run\n"
        "from hypershard.errors import HypershardError\n"
        "try: sys.exit(run(sys.argv[1:]))\n"
        "except HypershardError as error: print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", program, "sagemaker", *words]
    environment = {"HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


COMMAND = ("--model", "llama3_8b", "--instance", "p5", "--role", ROLE, "--image", IMAGE, "--output", "s3://bucket/runs")


def test_dry_run_prints_the_request_without_torch_boto3_or_credentials() -> None:
    words = ["--nodes", "2", "--tag", "a=b", "--train_batch_size", "2", "--activation_checkpointing=1", "--dry_run"]
    done = dry_run(*COMMAND, *words)
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert not violations(request, "CreateTrainingJob", service="sagemaker")
    assert re.fullmatch(r"llama3-8b-p5-x2-\d{8}-\d{6}", request["TrainingJobName"])
    assert request["HyperParameters"]["train_batch_size"] == '"2"'
    assert "2 x p5.48xlarge at $" in done.stderr


def test_the_command_line_names_what_is_wrong() -> None:
    done = dry_run(*COMMAND, "--train_batchsize", "2", "--dry_run")
    assert done.returncode == 2
    assert "did you mean --train_batch_size?" in done.stderr
    done = dry_run(*COMMAND, "--run", "recipe.yaml", "--dry_run")
    assert done.returncode == 2 and "no plan" not in done.stderr
    assert done.stderr.startswith("unknown flag --run; did you mean --config")
    done = dry_run("stop", "--dry_run")
    assert done.returncode == 2
    assert "expected the name of one job" in done.stderr
