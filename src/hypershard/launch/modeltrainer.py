"""A request as a script for version 3 of the SageMaker SDK, for those whose tools are built on its ModelTrainer.

Written from the SDK's source (sagemaker-train 1.27, sagemaker-core 2.27). What it does differently is worked around:
an own image gets no source_code, or the SDK puts a shell between the platform and the training that swallows SIGTERM;
channels are Channel, because InputData with an s3:// text is always copied in full (input mode File); a volume of 30 GB
is asked for unless None is given; names always end in the time; the role is not simulated, which needs IAM rights.
"""

from __future__ import annotations

import re
from typing import Any

from .sagemaker import OPERATION, SERVICE, Submission
from .validate import input_shape

_HEADER = '''\
"""Start the training job {name} by the SageMaker SDK, version 3: python THIS_FILE

Written by `hypershard launch sagemaker --emit modeltrainer`. Needs: pip install 'sagemaker>=3.27,<4'
The SDK adds the time to the job's name, so a second start is another job; both would use the same checkpoints.
"""

import os

# Before the SDK is imported: else it asks IAM to simulate the role, which few are allowed to.
os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")

from sagemaker.core import shapes
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, Networking
'''
# Field of the request -> the constructor's name for it.
_PLAIN = {
    "RoleArn": "role",
    "HyperParameters": "hyperparameters",
    "Environment": "environment",
    "InputDataConfig": "input_data_config",
    "OutputDataConfig": "output_data_config",
    "CheckpointConfig": "checkpoint_config",
    "StoppingCondition": "stopping_condition",
    "Tags": "tags",
}


def model_trainer_script(submission: Submission) -> str:
    """Python source that starts the job of `submission`. Its files (the run file) must be in S3 before."""
    request = submission.request
    algorithm = request["AlgorithmSpecification"]
    members = input_shape(OPERATION, service=SERVICE).members
    compute = {_snake(name): value for name, value in request["ResourceConfig"].items()}
    compute.setdefault("volume_size_in_gb", None)
    compute["enable_managed_spot_training"] = request["EnableManagedSpotTraining"]
    arguments = {
        "base_job_name": repr(request["TrainingJobName"]),
        "training_image": repr(algorithm["TrainingImage"]),
        "training_input_mode": repr(algorithm["TrainingInputMode"]),
        "compute": _call("Compute", {name: repr(value) for name, value in compute.items()}, 1),
    }
    if "VpcConfig" in request:
        network = {_snake(name): repr(value) for name, value in request["VpcConfig"].items()}
        arguments["networking"] = _call("Networking", network, 1)
    for field, name in _PLAIN.items():
        if field in request:
            arguments[name] = _code(members[field], request[field], 1)
    metrics = members["AlgorithmSpecification"].members["MetricDefinitions"]
    lines = [
        _HEADER.format(name=request["TrainingJobName"]),
        f"trainer = {_call('ModelTrainer', arguments, 0)}",
        f"trainer.with_metric_definitions({_code(metrics, algorithm['MetricDefinitions'], 0)})",
    ]
    if "RetryStrategy" in request:
        lines.append(f"trainer.with_retry_strategy({_code(members['RetryStrategy'], request['RetryStrategy'], 0)})")
    lines.append("trainer.train(wait=True, logs=True)")
    return "\n".join(lines) + "\n"


def _code(shape: Any, value: Any, depth: int) -> str:
    """`value` as an expression. The SDK's classes are generated from the same description, so they bear its names."""
    if shape.type_name == "structure":
        members = {_snake(name): _code(shape.members[name], one, depth + 1) for name, one in value.items()}
        return _call(f"shapes.{shape.name}", members, depth)
    inner, outer = "    " * (depth + 1), "    " * depth
    if shape.type_name == "list":
        entries = "".join(f"{inner}{_code(shape.member, one, depth + 1)},\n" for one in value)
        return f"[\n{entries}{outer}]"
    if shape.type_name == "map":
        entries = "".join(f"{inner}{key!r}: {one!r},\n" for key, one in value.items())
        return f"{{\n{entries}{outer}}}"
    return repr(value)


def _call(name: str, arguments: dict[str, str], depth: int) -> str:
    inner, outer = "    " * (depth + 1), "    " * depth
    return f"{name}(\n" + "".join(f"{inner}{key}={value},\n" for key, value in arguments.items()) + f"{outer})"


def _snake(name: str) -> str:
    """`S3DataType -> s3_data_type`, `VolumeSizeInGB -> volume_size_in_gb`, as the SDK spells it."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
