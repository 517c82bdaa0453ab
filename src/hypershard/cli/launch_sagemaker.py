"""`hypershard launch sagemaker`: start a training job on SageMaker; `status`, `stop` and `resume` one."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalog.instances import instance as find_instance
from ..catalog.instances import price
from ..errors import ConfigError
from ..launch.build import build_job
from ..launch.job import Job
from ..launch.sagemaker import RUN_DIR, SERVICE, SYNCED_RUN_DIR, Options, Submission, create_training_job_request
from ..log import logger, setup_logging
from ..plan.estimate import Plan
from ..units import format_seconds
from .launch_flags import named_values
from .launch_output import write_file
from .launch_plan import planned

if TYPE_CHECKING:
    from ..launch.sagemaker_jobs import Clients

_DESCRIPTION = """\
Start `hypershard train` as a SageMaker training job: everything that is no flag below is a flag of training. The whole
request is judged here, against the service's own description, before anything is sent; --dry_run prints it and needs
neither credentials nor a network. Checkpoints go to S3, and a job always goes on from the newest one it finds there.
"""
_EXAMPLES = """\
examples:
  hypershard launch sagemaker --model llama3_8b --instance p5 --nodes 4 --role arn:aws:iam::111122223333:role/train \\
    --image 111122223333.dkr.ecr.us-west-2.amazonaws.com/hypershard:1 --output s3://bucket/runs \\
    --channel train=s3://bucket/bins --train_batch_size 2 --follow
  hypershard launch sagemaker --config recipes/llama4_scout_chat_qlora.yaml --instance ml.p4d.24xlarge --dry_run …
  hypershard launch sagemaker … --spot --max_wait_hours 72 --dry_run > request.json
  hypershard launch sagemaker … --emit modeltrainer start.py
  hypershard launch sagemaker status NAME
  hypershard launch sagemaker stop NAME
  hypershard launch sagemaker resume NAME --hours 48
"""
_HOURS, _MAX_RESTARTS = 24.0, 3
_MOST_HOURS = 28 * 24.0  # SageMaker's
_POLL_SECONDS = 10.0
_MOST_NAME = 63
# Exit code of a job that ended in another way than Completed.
_NOT_COMPLETED = 1


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "sagemaker",
        help="start, watch, stop and resume a SageMaker training job",
        usage="hypershard launch sagemaker [--model NAME | --config FILE] --instance TYPE … [flags of train]\n"
        "       hypershard launch sagemaker status NAME [--follow | --json]\n"
        "       hypershard launch sagemaker stop NAME\n"
        "       hypershard launch sagemaker resume NAME [--name NEW] [--hours H] [--dry_run] [--follow]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_job_flags(parser)
    _add_platform_flags(parser)
    # Words and flags that are not known here arrive in train_flags.
    parser.set_defaults(do=sagemaker, takes_train_flags=True, train_flags=[])


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("job")
    job.add_argument("--model", metavar="NAME", help="model file, as of `hypershard train`")
    job.add_argument("--instance", metavar="NAME", help="instance type or family: p5, p5.48xlarge, ml.p5.48xlarge")
    job.add_argument("--nodes", type=int, default=1, metavar="N", help="how many (default: 1)")
    job.add_argument(
        "--hours", type=float, metavar="H", help="time limit; default: by the plan, if --max_steps is given"
    )
    job.add_argument("--name", metavar="NAME", help="job name; default: made of model, instance, nodes and the time")
    job.add_argument(
        "--max_restarts",
        type=int,
        default=_MAX_RESTARTS,
        metavar="N",
        help="new starts of crashed ranks, and of the job after a fault of the service (default: %(default)s)",
    )
    job.add_argument("--environment", action="append", default=[], metavar="NAME=VALUE", help="a variable of the ranks")
    job.add_argument("--run_dir", metavar="DIR", help=f"run directory in the container; default: {RUN_DIR}")
    job.add_argument(
        "--prices_file", type=Path, metavar="FILE", help="your own prices, YAML: `p5.48xlarge: {sagemaker: 55.0}`"
    )
    job.add_argument("--dry_run", action="store_true", help="print the request as JSON and stop")
    job.add_argument("--follow", action="store_true", help="print status and log until the job ends")
    job.add_argument("--json", action="store_true", help="status: as one JSON object")
    job.add_argument(
        "--emit", nargs=2, metavar=("modeltrainer", "FILE"), help="write a script for the SageMaker SDK v3 instead"
    )


def _add_platform_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("SageMaker")
    group.add_argument("--role", metavar="ARN", help="IAM role that the job acts as")
    group.add_argument("--image", metavar="URI", help="container image in ECR")
    group.add_argument("--output", metavar="S3", help="s3:// prefix for what the job leaves, in a folder of its name")
    group.add_argument("--region", metavar="REGION", help="AWS region; default: boto3's")
    group.add_argument(
        "--channel",
        action="append",
        default=[],
        metavar="NAME=URI",
        help="data: s3://… (read as needed) or fsx://fs-ID/mount/folder; train becomes --dataset, model --init_from, "
        "tokenizer --tokenizer, before what a run file says",
    )
    group.add_argument("--checkpoint_s3", metavar="S3", help="checkpoints; default: <output>/<name>/checkpoints")
    group.add_argument("--sync_run_dir", action="store_true", help="copy the run directory to S3 while the job runs")
    group.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    group.add_argument(
        "--max_wait_hours", type=float, metavar="H", help="--spot: waiting and running; default: twice --hours"
    )
    group.add_argument("--warm_pool_minutes", type=int, metavar="M", help="keep the machines so long for a next job")
    group.add_argument("--volume_gb", type=int, metavar="GB", help="disk, for types without NVMe")
    group.add_argument("--subnet", action="append", default=[], metavar="ID", help="of your VPC; may be repeated")
    group.add_argument("--security_group", action="append", default=[], metavar="ID", help="may be repeated")
    group.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")


def sagemaker(args: argparse.Namespace) -> int:
    """Do what the first word says; without one, start a job. Raises ConfigError and what SageMaker refuses."""
    setup_logging()
    action = {"status": _status, "stop": _stop, "resume": _resume}.get(args.train_flags[0] if args.train_flags else "")
    if action is None:
        return _launch(args)
    if len(args.train_flags) != 2 or args.train_flags[1].startswith("-"):
        found = " ".join(args.train_flags[1:]) or "nothing"
        raise ConfigError(f"launch sagemaker {args.train_flags[0]}: found {found!r}, expected the name of one job")
    return action(args, args.train_flags[1])


def _launch(args: argparse.Namespace) -> int:
    """Start the job, or print or write what would."""
    if args.emit and args.emit[0] != "modeltrainer":
        raise ConfigError(f"--emit {args.emit[0]}: expected modeltrainer, and the file to write")
    job = _job(args)
    submission = create_training_job_request(job, _options(args))
    if args.emit:
        return _emit(submission, Path(args.emit[1]))
    _say_cost(job, is_spot=args.spot, prices_file=args.prices_file)
    if args.dry_run:
        return _print(submission)
    return _start(submission, region=args.region, follow=args.follow)


def _job(args: argparse.Namespace) -> Job:
    job = build_job(
        train_flags=args.train_flags,
        model_name=args.model,
        instance=args.instance,
        num_nodes=args.nodes,
        run_dir=args.run_dir or (SYNCED_RUN_DIR if args.sync_run_dir else RUN_DIR),
        hours=_HOURS if args.hours is None else args.hours,
        image=args.image,
        max_restarts=args.max_restarts,
        name=args.name,
        extra_environment=named_values("--environment", args.environment),
        channels=named_values("--channel", args.channel),
    )
    made = planned(
        args.model,
        args.instance,
        num_nodes=args.nodes,
        train_flags=args.train_flags,
        service=SERVICE,
        prices_file=args.prices_file,
    )
    if args.hours is None:
        job = dataclasses.replace(job, hours=_hours(made))
    if args.name:
        return job
    stamp = datetime.datetime.now(datetime.UTC).strftime("-%Y%m%d-%H%M%S")  # a name can be used once
    return dataclasses.replace(job, name=job.name[-(_MOST_NAME - len(stamp)) :].strip("-") + stamp)


def _hours(made: Plan | None) -> float:
    """The time limit where none is given: what the plan says at most and an hour for start and saves, or a day."""
    if made is None or made.most_hours is None:
        why = "no plan could be made" if made is None else "no --max_steps says how long the training is"
        logger.info(f"time limit {_HOURS:g} h, because {why}; --hours sets it")
        return _HOURS
    most = made.most_hours
    hours = min(_MOST_HOURS, math.ceil(most + 1))
    logger.info(f"time limit {hours:g} h: planned at most {most:.1f} h, and one for start and saves; --hours sets it")
    return hours


def _options(args: argparse.Namespace) -> Options:
    return Options(
        role=args.role,
        output=args.output,
        channels=named_values("--channel", args.channel),
        checkpoint_s3=args.checkpoint_s3,
        sync_run_dir=args.sync_run_dir,
        spot=args.spot,
        max_wait_hours=args.max_wait_hours,
        warm_pool_minutes=args.warm_pool_minutes,
        volume_gb=args.volume_gb,
        subnets=tuple(args.subnet),
        security_groups=tuple(args.security_group),
        tags=named_values("--tag", args.tag),
    )


def _say_cost(job: Job, *, is_spot: bool, prices_file: Path | None) -> None:
    num_nodes, hours = job.resources.num_nodes, job.hours
    each = price(find_instance(job.resources.instance_type), SERVICE, prices_file=prices_file)
    if each is None:
        logger.info(f"{num_nodes} x {job.resources.instance_type} for at most {hours:g} h; its price is unknown")
        return
    dollars = each.dollars_per_hour * num_nodes * hours
    less = ", before what spot saves" if is_spot else ""
    logger.info(f"{num_nodes} x {job.resources.instance_type} at {each}: at most ${dollars:,.0f} in {hours:g} h{less}")


def _emit(submission: Submission, path: Path) -> int:
    from ..launch.modeltrainer import model_trainer_script

    if submission.files:
        raise ConfigError(
            "--emit modeltrainer: these flags need files in S3, which the script cannot write; put settings into a run "
            "file there (--config=s3://…), other files into a channel"
        )
    write_file(path, model_trainer_script(submission))
    logger.info(f"wrote {path}; it needs the SageMaker SDK, with which it was not run here")
    return 0


def _print(submission: Submission) -> int:
    print(json.dumps(submission.request, indent=1, ensure_ascii=False))
    for uri, content in submission.files.items():
        logger.info(f"would write {uri} first:\n{content.decode(errors='replace')}")
    return 0


def _start(submission: Submission, *, region: str | None, follow: bool) -> int:
    from ..launch.sagemaker_jobs import checkpoints_of, connect, submit

    clients = connect(region)
    arn = submit(clients, submission)
    name = submission.request["TrainingJobName"]
    where = checkpoints_of(submission.request)
    logger.info(f"started {arn}" + (f"; checkpoints in {where}" if where else ""))
    if not follow:
        logger.info(f"watch it by: hypershard launch sagemaker status {name} --follow")
        return 0
    return _follow(clients, name)


def _follow(clients: Clients, name: str) -> int:
    from ..launch.sagemaker_jobs import LogLine, Progress, Status, follow

    completed = False
    try:
        for event in follow(clients, name, pause=lambda: time.sleep(_POLL_SECONDS)):
            match event:
                case Status():
                    completed = event.status == "Completed"
                    logger.info(f"{event.status} ({event.secondary}) {event.message} {event.reason}".rstrip())
                case LogLine():
                    print(f"{event.host}  {event.text}", flush=True)
                case Progress():
                    share = event.step / max(1, event.last_step)
                    print(f"step {event.step}/{event.last_step} ({share:.0%})  {event.text}", flush=True)
    except KeyboardInterrupt:
        print(f"\n{name} goes on; end it by: hypershard launch sagemaker stop {name}", file=sys.stderr)
        raise
    return 0 if completed else _NOT_COMPLETED


def _status(args: argparse.Namespace, name: str) -> int:
    """Print where a job is."""
    from ..launch.sagemaker_jobs import connect, describe, status_of

    clients = connect(args.region)
    if args.follow:
        return _follow(clients, name)
    found = status_of(describe(clients, name))
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
        return 0
    print(f"{found.name}: {found.status} ({found.secondary}) {found.message}".rstrip())
    if found.reason:
        print(f"  failed: {found.reason}")
    if found.training_seconds is not None and found.billable_seconds is not None:
        took, paid = format_seconds(found.training_seconds), format_seconds(found.billable_seconds)
        print(f"  trained for {took}, billed for {paid} of each machine")
    for metric, value in found.metrics.items():
        print(f"  {metric} {value:.6g}")
    return 0


def _stop(args: argparse.Namespace, name: str) -> int:
    from ..launch.sagemaker_jobs import connect, stop

    stop(connect(args.region), name)
    logger.info(f"{name} stops; its ranks have 2 minutes to save. Go on later by: launch sagemaker resume {name}")
    return 0


def _resume(args: argparse.Namespace, name: str) -> int:
    """Start a new job with the old one's request."""
    from ..launch.sagemaker_jobs import connect, resume

    submission = resume(connect(args.region), name, new_name=args.name, hours=args.hours)
    if args.dry_run:
        return _print(submission)
    return _start(submission, region=args.region, follow=args.follow)
