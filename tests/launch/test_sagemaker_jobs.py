"""Jobs that exist: sequences of answers as AWS gives them (botocore's Stubber), and a round trip through moto."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from tests.conftest import BUCKET
from tests.s3_server import SECRET_KEY, Server

from hypershard.cli import launch, launch_sagemaker
from hypershard.errors import ConfigError
from hypershard.launch import sagemaker_jobs
from hypershard.launch.build import build_job
from hypershard.launch.sagemaker import RUN_DIR, Options, Submission, create_training_job_request
from hypershard.launch.sagemaker_jobs import (
    Clients,
    LogLine,
    Progress,
    SageMakerRefusal,
    Status,
    checkpoints_of,
    connect,
    describe,
    follow,
    next_name,
    progress_of,
    resume,
    resumed,
    status_of,
    stop,
    submit,
)
from hypershard.launch.validate import violations

NAME = "demo"
ARN = f"arn:aws:sagemaker:us-west-2:111122223333:training-job/{NAME}"
ROLE = "arn:aws:iam::111122223333:role/train"
GROUP = "/aws/sagemaker/TrainingJobs"
LINE = "step {}/600  loss 5.1234  norm 1.21  lr 3.0e-04  12.3k tok/s  1.20 GiB  eta 42s"


def submission(*flags: str, output: str = f"s3://{BUCKET}/runs", **options: Any) -> Submission:
    job = build_job(
        train_flags=flags,
        model_name="llama3_8b",
        instance="p5",
        num_nodes=2,
        run_dir=RUN_DIR,
        hours=1.0,
        image="111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1",
        max_restarts=1,
        name=NAME,
        extra_environment={},
    )
    return create_training_job_request(job, Options(role=ROLE, output=output, **options))


@pytest.fixture(scope="module")
def unasked() -> Clients:
    """Clients that may not reach anything; made once, because it takes half a second.

    What they are told is for them alone: other clients of this module find the server of the session.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens at this port
        return connect("us-west-2")


@pytest.fixture
def stubs(unasked: Clients) -> Iterator[tuple[Clients, Stubber, Stubber]]:
    with Stubber(unasked.sagemaker) as sagemaker, Stubber(unasked.logs) as logs:
        yield unasked, sagemaker, logs
        sagemaker.assert_no_pending_responses()
        logs.assert_no_pending_responses()


def described(status: str = "InProgress", secondary: str = "Training", **more: Any) -> dict[str, Any]:
    """DescribeTrainingJob's answer for the job of `submission`, with what the service adds."""
    request = dict(submission().request)
    request.pop("Tags", None)
    return {
        **request,
        "TrainingJobArn": ARN,
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "CreationTime": 1.7e9,
        "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/runs/demo/output/model.tar.gz"},
        "EnableNetworkIsolation": False,
        **more,
    }


def answer(stub: Stubber, status: str, secondary: str, **more: Any) -> None:
    stub.add_response("describe_training_job", described(status, secondary, **more), {"TrainingJobName": NAME})


def answer_streams(stub: Stubber, *hosts: str) -> None:
    streams = [{"logStreamName": f"{NAME}/{host}-1700000000"} for host in hosts]
    wanted = {"logGroupName": GROUP, "logStreamNamePrefix": f"{NAME}/"}
    stub.add_response("describe_log_streams", {"logStreams": streams}, wanted)


def answer_page(stub: Stubber, host: str, lines: list[tuple[int, str]], token: str | None, following: str) -> None:
    wanted = {"logGroupName": GROUP, "logStreamName": f"{NAME}/{host}-1700000000", "startFromHead": True}
    events = [{"timestamp": at, "message": text} for at, text in lines]
    stub.add_response(
        "get_log_events",
        {"events": events, "nextForwardToken": following},
        wanted if token is None else {**wanted, "nextToken": token},
    )


def missing(stub: Stubber, operation: str) -> None:
    stub.add_client_error(operation, "ResourceNotFoundException", "The specified log group does not exist.", 400)


def test_a_job_is_followed_from_start_to_end(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, logs = stubs
    transitions = [{"Status": "Starting", "StartTime": 1.7e9, "StatusMessage": "Preparing the instances"}]
    answer(sagemaker, "InProgress", "Starting", SecondaryStatusTransitions=transitions)
    missing(logs, "describe_log_streams")  # there is no log yet
    answer(sagemaker, "InProgress", "Training")
    answer_streams(logs, "algo-1", "algo-2")
    answer_page(logs, "algo-1", [(10, "hello\n"), (30, LINE.format(1))], None, "f/1")
    answer_page(logs, "algo-1", [(40, LINE.format(2))], "f/1", "f/2")
    answer_page(logs, "algo-1", [], "f/2", "f/2")  # the same token: the end for now
    answer_page(logs, "algo-2", [(20, "hello too")], None, "g/1")
    answer_page(logs, "algo-2", [], "g/1", "g/1")
    answer(sagemaker, "InProgress", "Interrupted")  # spot
    answer_streams(logs, "algo-1", "algo-2")
    answer_page(logs, "algo-1", [], "f/2", "f/2")
    answer_page(logs, "algo-2", [], "g/1", "g/1")
    answer(sagemaker, "Failed", "Failed", FailureReason="AlgorithmError: out of memory")
    answer_streams(logs, "algo-1", "algo-2")
    answer_page(logs, "algo-1", [(90, "out of memory")], "f/2", "f/3")
    answer_page(logs, "algo-1", [], "f/3", "f/3")
    answer_page(logs, "algo-2", [], "g/1", "g/1")
    waits: list[None] = []
    events = list(follow(clients, NAME, pause=lambda: waits.append(None)))
    shown = [(event.secondary, event.message) if isinstance(event, Status) else event for event in events]
    assert shown == [
        ("Starting", "Preparing the instances"),
        ("Training", ""),
        LogLine(10, "algo-1", "hello"),
        LogLine(20, "algo-2", "hello too"),
        Progress(2, 600, LINE.format(2).partition("  ")[2]),
        ("Interrupted", ""),
        LogLine(90, "algo-1", "out of memory"),
        ("Failed", ""),
    ]
    assert isinstance(events[-1], Status) and events[-1].reason == "AlgorithmError: out of memory"
    assert len(waits) == 4  # three between looks, and one for the last lines


def test_a_log_of_many_hosts_comes_in_pages(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, logs = stubs
    answer(sagemaker, "Completed", "Completed")
    wanted = {"logGroupName": GROUP, "logStreamNamePrefix": f"{NAME}/"}
    first, second = ({"logStreamName": f"{NAME}/algo-{number}-1700000000"} for number in (1, 2))
    logs.add_response("describe_log_streams", {"logStreams": [first], "nextToken": "n"}, wanted)
    logs.add_response("describe_log_streams", {"logStreams": [second]}, {**wanted, "nextToken": "n"})
    answer_page(logs, "algo-1", [(2, "b")], None, "f/1")
    answer_page(logs, "algo-1", [], "f/1", "f/1")
    missing(logs, "get_log_events")  # a stream may be announced before it is there
    assert [event.text for event in follow(clients, NAME, pause=lambda: None) if isinstance(event, LogLine)] == ["b"]


def test_the_status_says_what_a_person_asks_for() -> None:
    metric = {"MetricName": "train:loss", "Value": 2.5, "Timestamp": 1.7e9}
    found = status_of(
        described("Stopped", "MaxRuntimeExceeded", TrainingTimeInSeconds=3600, BillableTimeInSeconds=1200,
                  FinalMetricDataList=[metric])
    )  # fmt: skip
    assert found == Status(NAME, "Stopped", "MaxRuntimeExceeded", "", "", 3600, 1200, {"train:loss": 2.5})
    assert found.is_over
    assert not status_of(described("Stopping", "Stopping")).is_over


def test_stop_asks_for_the_job_by_name(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, _ = stubs
    sagemaker.add_response("stop_training_job", {}, {"TrainingJobName": NAME})
    stop(clients, NAME)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ResourceInUse", "another --name"),
        ("ResourceLimitExceeded", "quota"),
        ("AccessDeniedException", "iam:PassRole"),
        ("ValidationException", "as the service said"),
    ],
)
def test_a_refusal_says_what_to_do(stubs: tuple[Clients, Stubber, Stubber], code: str, words: str) -> None:
    clients, sagemaker, _ = stubs
    sagemaker.add_client_error("create_training_job", code, "as the service said", 400)
    with pytest.raises(SageMakerRefusal) as caught:
        submit(clients, submission())
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert "starting demo" in str(caught.value) and words in str(caught.value)
    assert SECRET_KEY not in str(caught.value)


def test_a_wrong_signature_does_not_show_what_was_signed(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, _ = stubs
    reason = "The signature does not match.\n\nThe Canonical String should have been\n'POST\nx-amz-security-token:TOKEN"
    sagemaker.add_client_error("describe_training_job", "InvalidSignatureException", reason, 403)
    with pytest.raises(SageMakerRefusal) as caught:
        describe(clients, NAME)
    assert "(The signature does not match.)" in str(caught.value)
    assert "TOKEN" not in "".join(traceback.format_exception(caught.value))


def test_without_a_region_the_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(SageMakerRefusal, match="--region"):
        connect(None)


def test_resume_sends_the_same_request_under_a_new_name(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, _ = stubs
    answer(sagemaker, "Stopped", "MaxRuntimeExceeded", StoppingCondition={"MaxRuntimeInSeconds": 3600})
    tags = [{"Key": "team", "Value": "a"}, {"Key": "aws:created", "Value": "b"}]
    sagemaker.add_response("list_tags", {"Tags": tags}, {"ResourceArn": ARN})
    again = resume(clients, NAME, new_name=None, hours=5.0)
    expected = {**submission().request, "TrainingJobName": "demo-r2", "Tags": tags[:1], "EnableNetworkIsolation": False}
    assert again.request == {**expected, "StoppingCondition": {"MaxRuntimeInSeconds": 5 * 3600}}
    assert again.files == {}
    assert checkpoints_of(again.request) == f"s3://{BUCKET}/runs/demo/checkpoints"  # still those of the first


def test_resume_keeps_the_time_to_wait_for_spot() -> None:
    limits = {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 9000, "MaxPendingTimeInSeconds": 7200}
    again = resumed(described("Failed", StoppingCondition=limits), tags=[], new_name="demo-r3", hours=2.0)
    expected = {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 12600, "MaxPendingTimeInSeconds": 7200}
    assert again.request["StoppingCondition"] == expected
    assert "Tags" not in again.request


def test_resume_drops_what_the_service_chose() -> None:
    resources = {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 2, "SelectedInstanceType": "ml.p5.48xlarge"}
    again = resumed(described("Failed", ResourceConfig=resources), tags=[], new_name="a", hours=None)
    assert again.request["ResourceConfig"] == {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 2}


def test_resume_refuses_a_job_that_runs_or_is_not_ours(stubs: tuple[Clients, Stubber, Stubber]) -> None:
    clients, sagemaker, _ = stubs
    answer(sagemaker, "InProgress", "Training")
    with pytest.raises(ConfigError, match="demo is InProgress"):
        resume(clients, NAME, new_name=None, hours=None)
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        resumed(described("Failed", HyperParameters={"lr": "1"}), tags=[], new_name="a", hours=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("demo", "demo-r2"), ("demo-r2", "demo-r3"), ("demo-r9", "demo-r10"), ("a" * 63, "a" * 60 + "-r2")],
)
def test_names_count_on(name: str, expected: str) -> None:
    assert next_name(name) == expected
    assert len(next_name(name)) <= 63


def test_progress_is_read_from_metric_lines_alone() -> None:
    assert progress_of("[rank0] " + LINE.format(12)) == Progress(12, 600, LINE.format(12).partition("  ")[2])
    assert progress_of("saved step 12 to s3://bucket/step-12") is None


@pytest.fixture
def moto_clients(s3_server: Server) -> Clients:
    s3_server.reset()
    s3_server.create_bucket(BUCKET)
    return connect("us-east-1")


def test_a_job_goes_to_a_server_and_comes_back(moto_clients: Clients) -> None:
    mixture = ",".join(f"s3://bucket/part-{number:04}:0.01" for number in range(100))
    made = submission(
        f"--dataset={mixture}", spot=True, tags={"team": "a"}, channels={"tokenizer": "s3://bucket/tokenizer"}
    )
    arn = submit(moto_clients, made)
    assert arn.endswith(":training-job/demo")
    (uri,) = made.files
    key = uri.removeprefix(f"s3://{BUCKET}/")
    stored = boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()
    assert stored == made.files[uri]
    found = describe(moto_clients, NAME)
    for field in ("HyperParameters", "ResourceConfig", "StoppingCondition", "InputDataConfig", "RoleArn"):
        assert found[field] == made.request[field], field
    assert json.loads(found["HyperParameters"]["config"]) == uri
    assert status_of(found).is_over  # moto's jobs are done at once
    again = resume(moto_clients, NAME, new_name=None, hours=None)
    assert not violations(again.request, "CreateTrainingJob", service="sagemaker")
    lost = {field for field, value in made.request.items() if again.request.get(field) != value}
    # moto keeps neither of the last three; that they come back is tested above.
    assert lost == {"TrainingJobName", "AlgorithmSpecification", "Environment", "RetryStrategy"}
    assert submit(moto_clients, again).endswith("/demo-r2")


def test_an_unknown_job_is_refused_in_one_sentence(moto_clients: Clients) -> None:
    with pytest.raises(SageMakerRefusal, match="asking for nobody: AWS answered"):
        describe(moto_clients, "nobody")


def verb(*words: str) -> int:
    return launch.run(["sagemaker", *words])


def test_the_verb_starts_shows_and_resumes(
    moto_clients: Clients, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_sagemaker, "_POLL_SECONDS", 0.0)
    image = "111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1"
    common = ("--role", ROLE, "--image", image, "--output", f"s3://{BUCKET}/runs", "--instance", "g5")
    assert verb("--model", "tiny_llama", *common, "--name", "demo", "--max_steps", "3", "--follow") == 0
    shown = capsys.readouterr().err
    assert f"checkpoints in s3://{BUCKET}/runs/demo/checkpoints" in shown
    assert "Completed (Completed)" in shown
    assert verb("status", "demo", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "Completed"
    assert verb("status", "demo") == 0
    assert capsys.readouterr().out.startswith("demo: Completed (Completed)")
    assert verb("resume", "demo", "--hours", "2", "--dry_run") == 0
    request = json.loads(capsys.readouterr().out)
    assert (request["TrainingJobName"], request["StoppingCondition"]["MaxRuntimeInSeconds"]) == ("demo-r2", 7200)
    assert verb("resume", "demo", "--name", "again") == 0
    assert describe(moto_clients, "again")["HyperParameters"] == describe(moto_clients, "demo")["HyperParameters"]


def test_the_verb_stops_and_says_how_a_job_ended(
    stubs: tuple[Clients, Stubber, Stubber], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clients, sagemaker, logs = stubs
    monkeypatch.setattr(sagemaker_jobs, "connect", lambda region: clients)
    monkeypatch.setattr(launch_sagemaker, "_POLL_SECONDS", 0.0)
    sagemaker.add_response("stop_training_job", {}, {"TrainingJobName": NAME})
    assert verb("stop", NAME) == 0
    assert f"resume {NAME}" in capsys.readouterr().err
    answer(sagemaker, "Failed", "Failed", FailureReason="AlgorithmError: out of memory")
    answer_streams(logs, "algo-1")
    answer_page(logs, "algo-1", [(1, "hello"), (2, LINE.format(150))], None, "f/1")
    answer_page(logs, "algo-1", [], "f/1", "f/1")
    assert verb("status", NAME, "--follow") == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "algo-1  hello"
    assert out.splitlines()[1].startswith("step 150/600 (25%)  loss 5.1234")
    assert "AlgorithmError: out of memory" in err
