"""The script for SageMaker's SDK: compiled and read here, not run, because the SDK is not installed."""

from __future__ import annotations

import ast
from typing import Any

from hypershard.launch.build import build_job
from hypershard.launch.modeltrainer import model_trainer_script
from hypershard.launch.sagemaker import RUN_DIR, Options, create_training_job_request

ROLE = "arn:aws:iam::111122223333:role/train"
IMAGE = "111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1"


def written(**options: Any) -> tuple[str, dict[str, Any]]:
    job = build_job(
        train_flags=["--lr=3e-4"],
        model_name="llama3_8b",
        instance="p5",
        num_nodes=4,
        run_dir=RUN_DIR,
        hours=24.0,
        image=IMAGE,
        max_restarts=2,
        name="demo",
        extra_environment={"NOTE": 'it\'s "quoted" {and} \\ odd'},
    )
    made = create_training_job_request(job, Options(role=ROLE, output="s3://bucket/runs", **options))
    return model_trainer_script(made), made.request


def calls(text: str) -> dict[str, list[ast.Call]]:
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.setdefault(name, []).append(node)
    return found


def keywords(call: ast.Call) -> dict[str, Any]:
    """Keyword -> its value, or the name of the class it is an object of."""
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            node = keyword.value
            values[keyword.arg] = ast.unparse(node.func) if isinstance(node, ast.Call) else type(node).__name__
    return values


def test_the_script_says_what_the_request_says() -> None:
    text, request = written(
        channels={"train": "s3://bucket/bins"},
        spot=True,
        tags={"a": "b"},
        subnets=("subnet-1",),
        security_groups=("sg-1",),
    )
    compile(text, "start.py", "exec")
    found = calls(text)
    (trainer,) = found["ModelTrainer"]
    given = keywords(trainer)
    assert given["training_image"] == IMAGE
    assert given["role"] == ROLE
    assert given["hyperparameters"] == request["HyperParameters"]
    assert given["environment"] == request["Environment"]
    assert given["stopping_condition"] == "shapes.StoppingCondition"
    assert keywords(found["Compute"][0]) == {
        "instance_type": "ml.p5.48xlarge",
        "instance_count": 4,
        "volume_size_in_gb": None,
        "enable_managed_spot_training": True,
    }
    assert keywords(found["Networking"][0]) == {"subnets": ["subnet-1"], "security_group_ids": ["sg-1"]}
    assert keywords(found["StoppingCondition"][0])["max_wait_time_in_seconds"] == 48 * 3600
    assert keywords(found["RetryStrategy"][0]) == {"maximum_retry_attempts": 2}
    metrics = [keywords(call) for call in found["MetricDefinition"]]
    expected = request["AlgorithmSpecification"]["MetricDefinitions"]
    assert metrics == [{"name": one["Name"], "regex": one["Regex"]} for one in expected]
    assert keywords(found["train"][0]) == {"wait": True, "logs": True}


def test_the_traps_of_the_sdk_are_worked_around() -> None:
    text, _ = written(channels={"train": "s3://bucket/bins"}, sync_run_dir=True)
    found = calls(text)
    assert "InputData" not in found and "SourceCode" not in found
    assert keywords(found["Channel"][0])["input_mode"] == "FastFile"
    assert keywords(found["CheckpointConfig"][0]) == {"s3_uri": "s3://bucket/runs/demo/run", "local_path": RUN_DIR}
    # The variable is read when the SDK is imported, so it is set before.
    assert text.index('"SAGEMAKER_VALIDATE_ROLE", "false"') < text.index("from sagemaker.train import")


def test_every_field_of_the_largest_request_is_in_the_script() -> None:
    text, request = written(
        channels={"train": "fsx://fs-0123456789abcdef0/mount/data"},
        sync_run_dir=True,
        warm_pool_minutes=10,
        volume_gb=50,
        subnets=("subnet-1",),
        security_groups=("sg-1",),
        tags={"a": "b"},
    )
    constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}

    def leaves(value: Any) -> set[Any]:
        if isinstance(value, dict):
            return set().union(*(leaves(one) for one in value.values()))
        return set().union(*(leaves(one) for one in value)) if isinstance(value, list) else {value}

    assert leaves(request) <= constants
