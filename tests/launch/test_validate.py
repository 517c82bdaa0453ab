"""The validator against botocore's own description of services."""

from __future__ import annotations

from typing import Any

import pytest

from hypershard.errors import ConfigError
from hypershard.launch.validate import validate, violations

ROLE = "arn:aws:iam::111122223333:role/train"


def request(**changes: Any) -> dict[str, Any]:
    """A CreateTrainingJob request that AWS takes, with fields changed; None removes one."""
    whole = {
        "TrainingJobName": "demo",
        "RoleArn": ROLE,
        "AlgorithmSpecification": {"TrainingInputMode": "FastFile", "TrainingImage": "image:1"},
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
        "ResourceConfig": {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 2},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


def found(**changes: Any) -> list[str]:
    return [str(one) for one in violations(request(**changes), "CreateTrainingJob", service="sagemaker")]


def test_a_request_that_aws_takes_has_no_violation() -> None:
    assert found() == []
    assert found(Tags=[{"Key": "Größe", "Value": ""}], Environment={"A": "x" * 512}, HyperParameters={}) == []


@pytest.mark.parametrize(
    ("changes", "path", "expected"),
    [
        ({"RoleArn": None}, "RoleArn: found nothing", "a value"),
        ({"RoleArn": "train-role-of-the-team"}, "RoleArn: found 'train-role-of-the-team'", "pattern arn:aws"),
        (
            {"ResourceConfig": {"InstanceType": "ml.p5.49xlarge", "InstanceCount": 1}},
            "ResourceConfig.InstanceType: found 'ml.p5.49xlarge'",
            "ml.p5.48xlarge",
        ),
        ({"ResourceConfig": {"InstanceCount": -1}}, "ResourceConfig.InstanceCount: found -1", "at least 0"),
        ({"ResourceConfig": {"InstanceCount": "2"}}, "ResourceConfig.InstanceCount: found a str", "a whole number"),
        ({"ResourceConfig": {"InstanceCount": True}}, "ResourceConfig.InstanceCount: found a bool", "a whole number"),
        (
            {"ResourceConfig": {"KeepAlivePeriodInSeconds": 21601}},
            "ResourceConfig.KeepAlivePeriodInSeconds: found 21601",
            "at most 21600",
        ),
        ({"TrainingJobName": "a_b"}, "TrainingJobName: found 'a_b'", "pattern"),
        ({"TrainingJobName": "a" * 64}, "TrainingJobName: found 64 characters", "at most 63"),
        ({"Environment": {"A": "secret" * 100}}, "Environment.A: found 600 characters", "at most 512"),
        ({"Environment": {"1A": "x"}}, "Environment (the key): found '1A'", "pattern"),
        ({"Environment": {f"A{n}": "" for n in range(101)}}, "Environment: found 101 entries", "at most 100"),
        ({"HyperParameters": {"lr": "x" * 2501}}, "HyperParameters.lr: found 2501 characters", "at most 2500"),
        ({"HyperParameters": {"lr": 1}}, "HyperParameters.lr: found a int", "a text"),
        ({"RetryStrategy": {"MaximumRetryAttempts": 31}}, "RetryStrategy.MaximumRetryAttempts: found 31", "at most 30"),
        ({"InputDataConfig": []}, "InputDataConfig: found 0 entries", "at least 1"),
        (
            {"InputDataConfig": [{"ChannelName": "a", "DataSource": {"S3DataSource": {"S3Uri": "s3://b/c"}}}]},
            "InputDataConfig[0].DataSource.S3DataSource.S3DataType: found nothing",
            "a value",
        ),
        ({"Tags": [{"Key": "a*", "Value": "b"}]}, "Tags[0].Key: found 'a*'", "pattern"),
        ({"Enviroment": {}}, "Enviroment: found a field the service does not know", "Environment"),
        ({"VpcConfig": []}, "VpcConfig: found a list", "a structure"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_aws_would_refuse_is_named(changes: dict[str, Any], path: str, expected: str) -> None:
    (message,) = found(**changes)
    assert message.startswith(path)
    assert expected in message
    assert "secret" not in message


def test_all_faults_are_named_at_once_with_the_flags_to_change() -> None:
    bad = request(RoleArn=None, TrainingJobName="a b")
    with pytest.raises(ConfigError) as caught:
        validate(
            bad, "CreateTrainingJob", service="sagemaker", flags={"RoleArn": "--role", "TrainingJobName": "--name"}
        )
    message = str(caught.value)
    assert "RoleArn: found nothing, expected a value (--role)" in message
    assert "TrainingJobName: found 'a b'" in message and "(--name)" in message


@pytest.mark.parametrize(("members", "is_fine"), [(1, True), (0, False), (2, False)])
def test_a_union_has_exactly_one_member(members: int, is_fine: bool) -> None:
    kinds = {"ImageClassificationJobConfig": {}, "TimeSeriesForecastingJobConfig": {}}
    wanted = {"AutoMLProblemTypeConfig": dict([*kinds.items()][:members])}
    named = [str(one) for one in violations(wanted, "CreateAutoMLJobV2", service="sagemaker")]
    about = [one for one in named if one.startswith("AutoMLProblemTypeConfig: ")]
    assert bool(about) != is_fine
    assert all("exactly one of" in one and f"found {members} of its members" in one for one in about)


@pytest.mark.parametrize(
    ("service", "operation", "required"),
    [("sagemaker", "CreateCluster", {"ClusterName"}), ("ec2", "RunInstances", {"MinCount", "MaxCount"})],
)
def test_any_operation_of_any_service(service: str, operation: str, required: set[str]) -> None:
    assert {one.path for one in violations({}, operation, service=service)} == required


def test_nearly_every_pattern_of_the_service_can_be_read() -> None:
    from hypershard.launch.validate import _compiled, _service_model

    model = _service_model("sagemaker")
    patterns = {model.shape_for(name).metadata.get("pattern") for name in model.shape_names} - {None}
    unreadable = [pattern for pattern in patterns if _compiled(pattern) is None]
    assert len(patterns) > 200
    assert len(unreadable) <= 2, unreadable  # two are no regular expressions in Java either: ...)${1,128}
