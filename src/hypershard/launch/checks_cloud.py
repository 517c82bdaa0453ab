"""AWS as seen from here: whether there are credentials (never which), and whether the clock is right for S3."""

from __future__ import annotations

import datetime
import email.utils
from typing import Any

from ..s3.uri import S3Uri
from .checks_base import Check, Finding, Machine, fail, ok, warn

_REFUSED_SECONDS = 15 * 60  # RequestTimeTooSkewed, S3 API reference
_FAR_SECONDS = 30.0  # far more than the way there and back; NTP keeps a machine within milliseconds
_CONNECT_SECONDS = 5.0
_HOW = "attach a role to the instance or pod, or set AWS_PROFILE; aws sts get-caller-identity shows who you are"


def _credentials(machine: Machine) -> list[Finding]:
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        return [warn("aws credentials", "not checked: botocore is not installed", "pip install 'boto3[crt]'")]
    session = botocore.session.Session()
    session.set_config_variable("metadata_service_timeout", 1)
    session.set_config_variable("metadata_service_num_attempts", 1)
    try:
        found = session.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        return [warn("aws credentials", f"cannot be read: {type(error).__name__}", _HOW)]
    region = session.get_config_variable("region")
    where = f"region {region}" if region else "no region set (AWS_DEFAULT_REGION)"
    if found is None:
        fix = f"fine when nothing is read from or written to S3; else {_HOW}"
        return [warn("aws credentials", f"none; {where}", fix)]
    # The method says where they come from (env, shared-credentials-file, iam-role, container-role), not what they are.
    return [ok("aws credentials", f"from {found.method}; {where}")]


def judge_clock(skew_seconds: float, bucket: str) -> Finding:
    """`skew_seconds`: this machine's clock minus S3's."""
    found = f"{abs(skew_seconds):.0f} s {'ahead of' if skew_seconds > 0 else 'behind'} S3 ({bucket})"
    fix = "start chronyd; on EC2 its time source is 169.254.169.123"
    if abs(skew_seconds) >= _REFUSED_SECONDS:
        return fail("clock", f"{found}: S3 refuses requests from here", fix)
    if abs(skew_seconds) > _FAR_SECONDS:
        return warn("clock", found, fix)
    return ok("clock", f"within {_FAR_SECONDS:.0f} s of S3's ({bucket})")


def _bucket(machine: Machine) -> list[Finding]:
    """Ask for the bucket's head; whatever the answer is, it bears S3's date."""
    if machine.bucket is None:
        return []
    uri = S3Uri.parse(machine.bucket)
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return [fail("bucket", "not checked: boto3 is not installed", "pip install 'boto3[crt]'")]
    config = Config(connect_timeout=_CONNECT_SECONDS, read_timeout=_CONNECT_SECONDS, retries={"total_max_attempts": 1})
    try:
        answer: dict[str, Any] = boto3.session.Session().client("s3", config=config).head_bucket(Bucket=uri.bucket)
        findings = [ok("bucket", f"s3://{uri.bucket} answers")]
    except ClientError as error:
        answer = error.response
        code = str(answer.get("Error", {}).get("Code", "unknown"))
        fixes = {
            "404": "there is no bucket of this name",
            "403": f"it may not be seen from here: allow s3:ListBucket; {_HOW}",
            "301": "it is in another region: set AWS_DEFAULT_REGION",
        }
        findings = [fail("bucket", f"s3://{uri.bucket}: S3 says {code}", fixes.get(code, _HOW))]
    except (BotoCoreError, ValueError) as error:
        said = f"s3://{uri.bucket} cannot be asked: {type(error).__name__}"
        return [fail("bucket", said, f"{_HOW}; is there a way to S3 (VPC endpoint, NAT)?")]
    now = datetime.datetime.now(datetime.UTC)
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if date:
        findings.append(judge_clock((now - email.utils.parsedate_to_datetime(date)).total_seconds(), uri.bucket))
    return findings


CHECKS = (Check("aws credentials", _credentials, limit_seconds=10.0), Check("bucket", _bucket, limit_seconds=20.0))
