"""A SageMaker training job: the job's value as one CreateTrainingJob request, judged before it is sent.

The request is made here and sent by boto3; no SDK stands between. What the platform gives and takes:

    /opt/ml/input/data/CHANNEL   data of a channel, fetched as they are read (FastFile)
    /opt/ml/output/data          the run directory, on the first host: copied to --output when the job ends
    /opt/ml/checkpoints          the run directory with --sync_run_dir: copied while the job runs, back at a restart

Hosts share no disk, so checkpoints go to S3 by the training itself. A platform that copies /opt/ml/checkpoints would
bring the whole prefix to every host at each start, and mirror what is deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StorageError
from ..s3.uri import S3Uri
from .job import Job
from .paths import warn_of_paths
from .sagemaker_environment import CHANNELS
from .sagemaker_flags import Hyperparameters, decode, encode
from .validate import validate

OPERATION = "CreateTrainingJob"
SERVICE = "sagemaker"
RUN_DIR = "/opt/ml/output/data"
SYNCED_RUN_DIR = "/opt/ml/checkpoints"
CHANNELS_DIR = "/opt/ml/input/data"
_MOST_HOURS = 28 * 24  # https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_StoppingCondition.html
_FSX = re.compile(r"fsx://(?P<id>fs-[0-9a-f]+)(?P<directory>/.*)")
# Flags of training that take a small file of this machine along, in a channel of its own.
_SMALL_FILES = ("chat_template", "validation_prompts")
_FILES_CHANNEL = "run_files"

# Lines of metrics/display.py. A number of tokens comes with its unit, so there is one metric for each.
METRICS = {
    "train:step": r"step ([0-9]+)/[0-9]+  loss",
    "train:loss": r"step [0-9]+/[0-9]+  loss ([0-9.]+)",
    "train:grad_norm": r"  norm ([0-9.]+)",
    "train:lr": r"  lr ([0-9.]+e[-+][0-9]+)",
    "train:tokens_per_second": r"  ([0-9.]+) tok/s",
    "train:thousand_tokens_per_second": r"  ([0-9.]+)k tok/s",
    "train:million_tokens_per_second": r"  ([0-9.]+)M tok/s",
    "train:mfu_percent": r"  mfu ([0-9.]+)%",
    "train:memory_gib": r"  ([0-9.]+) GiB",
    "validation:loss": r"step [0-9]+/[0-9]+  validation loss ([0-9.]+)",
}

# Field of the request -> the flag that sets it; the longer ones first.
FLAGS = {
    "TrainingJobName": "--name",
    "RoleArn": "--role",
    "AlgorithmSpecification.TrainingImage": "--image",
    "InputDataConfig": "--channel",
    "OutputDataConfig": "--output",
    "CheckpointConfig": "--output",
    "ResourceConfig.InstanceType": "--instance",
    "ResourceConfig.InstanceCount": "--nodes",
    "ResourceConfig.KeepAlivePeriodInSeconds": "--warm_pool_minutes",
    "ResourceConfig.VolumeSizeInGB": "--volume_gb",
    "StoppingCondition.MaxWaitTimeInSeconds": "--max_wait_hours",
    "StoppingCondition": "--hours",
    "VpcConfig.SecurityGroupIds": "--security_group",
    "VpcConfig.Subnets": "--subnet",
    "Environment": "--environment",
    "RetryStrategy": "--max_restarts",
    "Tags": "--tag",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a SageMaker job has besides the job's value.

    `role`: ARN of the IAM role that the job acts as. `output`: s3:// prefix of everything it leaves. `channels`: name
    -> s3://… (FastFile) or fsx://fs-ID/mount/folder (Lustre, needs `subnets` and `security_groups`); which name means
    what is `sagemaker_environment.CHANNELS`. `checkpoint_s3` None: <output>/<name>/checkpoints. `max_wait_hours`:
    waiting for spot and running together; None: twice the job's hours. `warm_pool_minutes`: the machines stay for the
    next job. `volume_gb`: for types without NVMe alone.
    """

    role: str | None
    output: str | None
    channels: Mapping[str, str] = field(default_factory=dict)
    checkpoint_s3: str | None = None
    sync_run_dir: bool = False
    spot: bool = False
    max_wait_hours: float | None = None
    warm_pool_minutes: int | None = None
    volume_gb: int | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Submission:
    """The request, and the small files (s3:// URI -> content) that must lie in S3 before it is sent: a run file, and
    what flags name."""

    request: dict[str, Any]
    files: Mapping[str, bytes]


def create_training_job_request(job: Job, options: Options) -> Submission:
    """The request that starts `job`. Needs neither credentials nor a network.

    Raises ConfigError for a job that SageMaker would refuse, or would take and then lose, with the field and the flag.
    """
    _check(job, options)
    home = _s3("--output", options.output or "") / job.name
    flags = decode(job.train_flags)
    if _FILES_CHANNEL in options.channels:
        raise ConfigError(f"--channel {_FILES_CHANNEL}: jobs have a channel of this name of their own; choose another")
    _check_channels(flags, options.channels)
    # The file in S3 says only what is so: of a setting that a channel is, the channel.
    flags = flags.without_filed([CHANNELS[name] for name in options.channels if name in CHANNELS])
    flags, options, beside = _with_small_files(flags, home, options)
    flags = flags.with_settings(_checkpoints(flags, home, options))
    instead = "put it into S3 and give its s3:// URI or --channel"
    warn_of_paths(flags.settings, seen=(CHANNELS_DIR,), instead=instead)
    hyperparameters, files = encode(flags, home=home)
    if job.max_restarts:  # for the container's supervisor, which starts the ranks of a living job again
        hyperparameters["max_restarts"] = str(job.max_restarts)
    request = {
        "TrainingJobName": job.name,
        "AlgorithmSpecification": {
            # No ContainerEntrypoint: the image's own is exec form, so that the signal to stop reaches it.
            "TrainingImage": job.image,
            "TrainingInputMode": "FastFile",
            "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        },
        "HyperParameters": hyperparameters,
        "OutputDataConfig": {"S3OutputPath": options.output},
        "ResourceConfig": _resources(job, options),
        "StoppingCondition": _limits(job, options),
        "Environment": dict(job.environment),
        "EnableManagedSpotTraining": options.spot,
        **_optional(job, options, home),
    }
    validate(request, OPERATION, service=SERVICE, flags=FLAGS)
    return Submission(request, {**files, **beside})


def _check(job: Job, options: Options) -> None:
    """What the service's description does not say."""
    if job.image is None:
        raise ConfigError("--image: found none; expected the container image in ECR, ACCOUNT.dkr.ecr.REGION…/NAME:TAG")
    if not job.resources.instance_type:
        raise ConfigError("--instance: found none; expected an instance type or family, such as p5")
    if options.spot and options.warm_pool_minutes:
        raise ConfigError(
            f"--warm_pool_minutes={options.warm_pool_minutes}: machines that --spot gives are not kept; drop one"
        )
    if options.max_wait_hours is not None and not options.spot:
        raise ConfigError(f"--max_wait_hours={options.max_wait_hours:g}: only --spot waits for machines; add it")
    if options.max_wait_hours is not None and options.max_wait_hours < job.hours:
        raise ConfigError(
            f"--max_wait_hours={options.max_wait_hours:g}: waiting and running together, so expected at least "
            f"--hours={job.hours:g}"
        )
    if job.hours > _MOST_HOURS:
        raise ConfigError(f"--hours={job.hours:g}: a training job runs for at most {_MOST_HOURS} hours (28 days)")
    if bool(options.subnets) != bool(options.security_groups):
        raise ConfigError("--subnet and --security_group go together: found only one of them")


def _s3(flag: str, text: str) -> S3Uri:
    try:
        return S3Uri.parse(text)
    except StorageError as error:
        raise ConfigError(f"{flag}: {error}" if text else f"{flag}: found none; expected s3://bucket/prefix") from None


def _check_channels(flags: Hyperparameters, channels: Mapping[str, str]) -> None:
    """Every channel must be read, and by one flag: the container gives some channels' folders to flags by name, which
    go before a run file's values."""
    for name, where in channels.items():
        folder, flag = f"{CHANNELS_DIR}/{name}", CHANNELS.get(name)
        if any(folder in value for value in flags.settings.values()):
            continue
        if flag is None:
            raise ConfigError(
                f"--channel {name}={where}: no flag reads {folder}; add one, such as --dataset={folder}, or name the "
                f"channel {' or '.join(CHANNELS)}"
            )
        if flag in flags.flags or (flag == "config" and (flags.config is not None or flags.filed)):
            raise ConfigError(f"--channel {name}={where} becomes --{flag}={folder}: found another --{flag} beside it")


def _checkpoints(flags: Hyperparameters, home: S3Uri, options: Options) -> dict[str, str]:
    """The settings by which a checkpoint outlives the hosts. Raises ConfigError for those by which none would."""
    given = flags.settings.get("s3_tier_base_path")
    if given is not None and options.checkpoint_s3 is not None:
        raise ConfigError(f"--checkpoint_s3={options.checkpoint_s3} and --s3_tier_base_path={given}: give one of them")
    found = {"s3_tier_base_path": given or options.checkpoint_s3 or str(home / "checkpoints")}
    _s3("--s3_tier_base_path" if given else "--checkpoint_s3", found["s3_tier_base_path"])
    if "checkpoint_dir" in flags.settings:
        return found
    frequency = flags.settings.get("checkpoint_freq", "0")
    if frequency != "0":
        raise ConfigError(
            f"--checkpoint_freq={frequency}: hosts share no disk, and theirs end with the job; checkpoints go to "
            f"{found['s3_tier_base_path']} every --s3_checkpointing_freq steps. For a shared file system add "
            f"--checkpoint_dir={CHANNELS_DIR}/NAME and --channel NAME=fsx://…"
        )
    return {**found, "checkpoint_freq": "0"}


def _with_small_files(
    flags: Hyperparameters, home: S3Uri, options: Options
) -> tuple[Hyperparameters, Options, dict[str, bytes]]:
    """Flags and channels by which the job sees the small files of this machine, and what must be written before.

    They lie below a digest of their content, as the run file does: a second start of a name leaves the first its own.
    """
    contents: dict[str, bytes] = {}
    paths: dict[str, str] = {}
    for flag in _SMALL_FILES:
        value = flags.settings.get(flag, "")
        if "://" in value:
            raise ConfigError(f"--{flag}={value}: expected a file of this machine, which goes with the job")
        file = Path(value).expanduser()
        if value and not value.startswith(CHANNELS_DIR) and file.is_file():
            contents[f"{flag}{file.suffix}"] = file.read_bytes()
            paths[flag] = f"{CHANNELS_DIR}/{_FILES_CHANNEL}/{flag}{file.suffix}"
    if not contents:
        return flags, options, {}
    digest = hashlib.sha256(b"".join(contents[name] for name in sorted(contents))).hexdigest()[:12]
    folder = home / f"files-{digest}"
    options = dataclasses.replace(options, channels={**options.channels, _FILES_CHANNEL: f"{folder}/"})
    return flags.with_settings(paths), options, {str(folder / name): one for name, one in contents.items()}


def _resources(job: Job, options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {
        "InstanceType": f"ml.{job.resources.instance_type}",
        "InstanceCount": job.resources.num_nodes,
    }
    if options.volume_gb is not None:
        found["VolumeSizeInGB"] = options.volume_gb
    if options.warm_pool_minutes is not None:
        found["KeepAlivePeriodInSeconds"] = options.warm_pool_minutes * 60
    return found


def _limits(job: Job, options: Options) -> dict[str, int]:
    found = {"MaxRuntimeInSeconds": round(job.hours * 3600)}  # of all attempts together
    if options.spot:
        wait_hours = 2 * job.hours if options.max_wait_hours is None else options.max_wait_hours
        found["MaxWaitTimeInSeconds"] = round(wait_hours * 3600)
    return found


def _optional(job: Job, options: Options, home: S3Uri) -> dict[str, Any]:
    """Fields that are left out where nothing was asked: the service takes no empty list of channels."""
    found: dict[str, Any] = {}
    if options.role is not None:
        found["RoleArn"] = options.role
    if options.channels:
        found["InputDataConfig"] = [_channel(name, where, options) for name, where in options.channels.items()]
    if options.sync_run_dir:
        found["CheckpointConfig"] = {"S3Uri": str(home / "run"), "LocalPath": job.run_dir}
    if options.subnets:
        found["VpcConfig"] = {"Subnets": [*options.subnets], "SecurityGroupIds": [*options.security_groups]}
    if job.max_restarts:  # after a fault of the service, on new machines
        found["RetryStrategy"] = {"MaximumRetryAttempts": job.max_restarts}
    if options.tags:
        found["Tags"] = [{"Key": key, "Value": value} for key, value in options.tags.items()]
    return found


def _channel(name: str, where: str, options: Options) -> dict[str, Any]:
    if lustre := _FSX.fullmatch(where):
        if not options.subnets:
            raise ConfigError(f"--channel {name}={where}: FSx is reached through a VPC; add --subnet, --security_group")
        source = {
            "FileSystemId": lustre["id"],
            "FileSystemType": "FSxLustre",
            "FileSystemAccessMode": "rw",
            "DirectoryPath": lustre["directory"],
        }
        return {"ChannelName": name, "DataSource": {"FileSystemDataSource": source}}
    _s3(f"--channel {name}={where}", where)
    source = {"S3DataType": "S3Prefix", "S3Uri": where, "S3DataDistributionType": "FullyReplicated"}
    # The mode stands in the channel too: that of the algorithm is a default that SDKs write over.
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "FastFile"}
