"""Training jobs that exist: send one, ask how it is, follow its log, stop it, go on with it.

Everything here talks to AWS by boto3, whose standard chain finds credentials and region; nothing here holds a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UserError
from ..s3.uri import Deadline, S3Uri
from .sagemaker import FLAGS, OPERATION, SERVICE, Submission
from .sagemaker_environment import flags_of
from .validate import input_shape, validate

_LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_UPLOAD_SECONDS = 60.0
_MOST_NAME = 63
_TIER = "s3_tier_base_path"
_PROGRESS = re.compile(r"step (?P<step>[0-9]+)/(?P<last>[0-9]+)  (?P<rest>.*)")
_ENDS = ("Completed", "Failed", "Stopped")
_HINTS = {
    "ResourceInUse": "a job of this name exists; give another --name",
    "ResourceLimitExceeded": "ask for a higher quota of this instance type for training jobs, or take fewer --nodes",
    "AccessDeniedException": "the credentials need sagemaker:CreateTrainingJob and iam:PassRole for --role",
    "ExpiredTokenException": "sign in again",
    "UnrecognizedClientException": "sign in again, and check the region (--region)",
}


class SageMakerRefusal(UserError):
    """An answer of SageMaker that says no; `code` is its word for it, "" where there was no answer."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Clients:
    """boto3's clients of the two services."""

    sagemaker: Any
    logs: Any


@dataclass(frozen=True)
class Status:
    """Where a job is. `reason` is why it failed, "" otherwise; seconds are None until known."""

    name: str
    status: str
    secondary: str
    message: str
    reason: str
    training_seconds: int | None
    billable_seconds: int | None
    metrics: Mapping[str, float]

    @property
    def is_over(self) -> bool:
        return self.status in _ENDS


@dataclass(frozen=True)
class LogLine:
    """One line of a host's log (algo-1 is the first host), written `at` milliseconds since 1970."""

    at: int
    host: str
    text: str


@dataclass(frozen=True)
class Progress:
    """How far training is, by its newest metric line; `text` is the rest of that line."""

    step: int
    last_step: int
    text: str


def connect(region: str | None) -> Clients:
    """Raises SageMakerRefusal where no region is known; whether there are credentials shows at the first request."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(retries={"mode": "standard", "max_attempts": 8}, connect_timeout=10, read_timeout=60)
    try:
        session = boto3.session.Session(region_name=region)
        return Clients(session.client("sagemaker", config=config), session.client("logs", config=config))
    except (BotoCoreError, ValueError) as error:
        raise SageMakerRefusal(f"SageMaker cannot be asked: {error}; give --region", "") from error


def submit(clients: Clients, submission: Submission) -> str:
    """Write the files, then start the job; returns its ARN. Raises StorageError or SageMakerRefusal."""
    if submission.files:
        from ..s3 import S3

        s3 = S3()
        for uri, content in submission.files.items():
            s3.put(S3Uri.parse(uri), content, deadline=Deadline.after(_UPLOAD_SECONDS))
    name = submission.request["TrainingJobName"]
    answer = _asked(f"starting {name}", lambda: clients.sagemaker.create_training_job(**submission.request))
    return str(answer["TrainingJobArn"])


def describe(clients: Clients, name: str) -> dict[str, Any]:
    """The service's whole answer about a job. Raises SageMakerRefusal."""
    found: dict[str, Any] = _asked(
        f"asking for {name}", lambda: clients.sagemaker.describe_training_job(TrainingJobName=name)
    )
    return found


def status_of(described: Mapping[str, Any]) -> Status:
    """The part of `describe`'s answer that a person asks for."""
    transitions = described.get("SecondaryStatusTransitions") or [{}]
    return Status(
        name=described["TrainingJobName"],
        status=described["TrainingJobStatus"],
        secondary=described.get("SecondaryStatus", ""),
        message=transitions[-1].get("StatusMessage", ""),
        reason=described.get("FailureReason", ""),
        training_seconds=described.get("TrainingTimeInSeconds"),
        billable_seconds=described.get("BillableTimeInSeconds"),
        metrics={one["MetricName"]: one["Value"] for one in described.get("FinalMetricDataList", [])},
    )


def stop(clients: Clients, name: str) -> None:
    """Ask the job to stop: its ranks get SIGTERM and have 120 s to save. Raises SageMakerRefusal."""
    _asked(f"stopping {name}", lambda: clients.sagemaker.stop_training_job(TrainingJobName=name))


def follow(clients: Clients, name: str, *, pause: Callable[[], Any]) -> Iterator[Status | LogLine | Progress]:
    """What happens to a job until it ends: each new status, the lines of every host in order of time, the progress.

    `pause` waits between two looks. Metric lines come as Progress, the newest of each look. Raises SageMakerRefusal.
    """
    logs = _Logs(clients.logs, name)
    former: Status | None = None
    while former is None or not former.is_over:
        if former is not None:
            pause()
        now = status_of(describe(clients, name))
        if now.is_over:
            pause()  # the last lines are the ones that say why, and they come late
        elif former is None or (now.secondary, now.message) != (former.secondary, former.message):
            yield now
        yield from _thinned(logs.new_lines())
        former = now
    yield former


def _thinned(lines: list[LogLine]) -> Iterator[LogLine | Progress]:
    newest: Progress | None = None
    for line in lines:
        found = progress_of(line.text)
        if found is None:
            yield line
        else:
            newest = found
    if newest is not None:
        yield newest


def progress_of(text: str) -> Progress | None:
    """What a line of the log says of the steps done; None for a line that is no metric line of training."""
    found = _PROGRESS.search(text)
    return Progress(int(found["step"]), int(found["last"]), found["rest"]) if found else None


class _Logs:
    """The log streams of a job, one per host, each with the place up to which it was read."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name
        self._tokens: dict[str, str | None] = {}

    def new_lines(self) -> list[LogLine]:
        """Lines of all hosts since the last call, by time."""
        self._find_streams()
        lines = [line for stream in self._tokens for line in self._read(stream)]
        return sorted(lines, key=lambda line: line.at)

    def _find_streams(self) -> None:
        wanted = {"logStreamNamePrefix": f"{self._name}/"}
        while True:
            page = self._ask("describe_log_streams", wanted)
            for stream in page.get("logStreams", []):
                self._tokens.setdefault(stream["logStreamName"], None)
            if "nextToken" not in page:
                return
            wanted["nextToken"] = page["nextToken"]

    def _read(self, stream: str) -> Iterator[LogLine]:
        host = stream.rpartition("/")[2].rpartition("-")[0]  # NAME/algo-1-1700000000
        while True:
            token = self._tokens[stream]
            wanted = {"logStreamName": stream, "startFromHead": True}
            page = self._ask("get_log_events", wanted if token is None else {**wanted, "nextToken": token})
            for event in page.get("events", []):
                yield LogLine(event["timestamp"], host, event["message"].rstrip("\n"))
            following = page.get("nextForwardToken")
            # The same token again is how the service says that this is the end for now; a page may well be empty.
            if following is None or following == token:
                return
            self._tokens[stream] = following

    def _ask(self, operation: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; an empty one while there is no log yet."""
        method = getattr(self._client, operation)
        try:
            answer: dict[str, Any] = _asked(
                f"reading the log of {self._name}", lambda: method(logGroupName=_LOG_GROUP, **wanted)
            )
        except SageMakerRefusal as refusal:
            if refusal.code != "ResourceNotFoundException":
                raise
            return {}
        return answer


def next_name(name: str) -> str:
    """`demo -> demo-r2 -> demo-r3`, shortened where the service's 63 characters do not suffice."""
    found = re.fullmatch(r"(.*)-r([0-9]+)", name)
    base, number = (found[1], int(found[2]) + 1) if found else (name, 2)
    suffix = f"-r{number}"
    return base[: _MOST_NAME - len(suffix)].rstrip("-") + suffix


def resume(clients: Clients, name: str, *, new_name: str | None, hours: float | None) -> Submission:
    """The request of a new job that goes on where `name` stopped: the same in all but its name and, given, its hours.

    Raises ConfigError for a job that still runs or left no checkpoint to go on from, and SageMakerRefusal.
    """
    described = describe(clients, name)
    if described["TrainingJobStatus"] not in _ENDS:
        raise ConfigError(f"{name} is {described['TrainingJobStatus']}; stop it, or wait until it ends, to go on anew")
    tags = _tags(clients, described["TrainingJobArn"])
    return resumed(described, tags=tags, new_name=new_name or next_name(name), hours=hours)


def _tags(clients: Clients, arn: str) -> list[dict[str, str]]:
    pages = _asked(
        f"asking for the tags of {arn}",
        lambda: [*clients.sagemaker.get_paginator("list_tags").paginate(ResourceArn=arn)],
    )
    # Tags of AWS's own cannot be given again.
    return [tag for page in pages for tag in page["Tags"] if not tag["Key"].lower().startswith("aws:")]


def resumed(
    described: Mapping[str, Any], *, tags: list[dict[str, str]], new_name: str, hours: float | None
) -> Submission:
    """The request that `described` was made of, under a new name. Raises ConfigError where it cannot go on."""
    name, given = described["TrainingJobName"], described.get("HyperParameters", {})
    if "resume_from_checkpoint" not in given and "config" not in given:
        raise ConfigError(f"{name} was not started by this program: found no resume_from_checkpoint among its settings")
    members = input_shape(OPERATION, service=SERVICE).members
    request = {field: value for field, value in described.items() if field in members}
    request["TrainingJobName"] = new_name
    # What the service chose among several types is its answer, not a wish.
    request["ResourceConfig"] = {
        field: value for field, value in request["ResourceConfig"].items() if not field.startswith("Selected")
    }
    if tags:
        request["Tags"] = tags
    if hours is not None:
        limits = dict(request["StoppingCondition"])
        more_seconds = round(hours * 3600) - limits["MaxRuntimeInSeconds"]
        request["StoppingCondition"] = {
            limit: seconds + more_seconds if limit != "MaxPendingTimeInSeconds" else seconds
            for limit, seconds in limits.items()
        }
    validate(request, OPERATION, service=SERVICE, flags=FLAGS)
    return Submission(request, {})


def checkpoints_of(request: Mapping[str, Any]) -> str | None:
    """Where the checkpoints of a job are, as far as its settings say; None: its run file says."""
    text = request.get("HyperParameters", {}).get(_TIER)
    return None if text is None else flags_of({_TIER: text})[0].partition("=")[2]


def _asked(doing: str, request: Callable[[], Any]) -> Any:
    """The answer, or one readable sentence."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return request()
    except ClientError as error:
        answer = error.response.get("Error", {})
        code = str(answer.get("Code", ""))
        # The first line alone: after a wrong signature the others hold what was signed, session token included.
        reason = next(iter(str(answer.get("Message", "")).splitlines()), "no reason given")
        hint = f"; {_HINTS[code]}" if code in _HINTS else ""
        raise SageMakerRefusal(f"{doing}: AWS answered {code} ({reason}){hint}", code) from None
    except BotoCoreError as error:
        hint = "check the credentials (AWS_* variables, config files, instance role), the region and the network"
        raise SageMakerRefusal(f"{doing}: {error}; {hint}", "") from error
