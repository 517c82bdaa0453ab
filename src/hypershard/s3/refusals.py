"""What S3, or the way to it, answers instead: whether it is worth another attempt, and in one sentence."""

from __future__ import annotations

import errno
import re
from typing import Any

from ..errors import StorageError

# Refusals that the same request may not meet again. All other 4xx are final.
_PASSING_STATUSES = {429, 500, 502, 503, 504}
PASSING_CODES = {
    "BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",  # damaged on the way
    "RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException",
    "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip

CREDENTIALS = "check the credentials that boto3's standard chain finds (AWS_* variables, config files, instance role)"
ENDPOINT = "check the network, the region and the endpoint (AWS_ENDPOINT_URL, or endpoint_url in the AWS config file)"
_REGION = "check the region (AWS_REGION, or region in the AWS config file)"
_HINTS = {
    "NoSuchBucket": "check the bucket's name (--s3_tier_base_path), the region and the endpoint",
    "AccessDenied": (
        "check that the credentials boto3's standard chain finds may do s3:ListBucket, s3:GetObject, s3:PutObject, "
        "s3:DeleteObject and s3:AbortMultipartUpload there, and the bucket's name (--s3_tier_base_path)"
    ),
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "InvalidToken": CREDENTIALS,
    "ExpiredToken": CREDENTIALS,
    "RequestTimeTooSkewed": "check this machine's clock",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
}


class AlreadyExists(StorageError):
    """An object that was to be new is there already."""


class Refusal(StorageError):
    """An answer of S3 that says no; `code` is S3's word for it."""

    def __init__(self, message: str, code: str):
        super().__init__(message, shared_by_all_ranks=False)
        self.code = code


class Broken(Exception):
    """An answer that is not what was asked for, though nothing refused it: worth another attempt."""


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed when it is made again."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ReadTimeoutError,
        SSLError,
    )
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUSES or _code(error) in PASSING_CODES
    if isinstance(error, SSLError):
        return "CERTIFICATE" not in str(error).upper()
    if isinstance(error, BotoCoreError):
        passing = (ConnectionError, HTTPClientError, IncompleteReadError, ReadTimeoutError, ResponseParserError)
        return isinstance(error, passing)
    return True


def _code(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def readable(doing: str, error: Exception, tried: str = "") -> Exception:
    """The error to raise for what S3 or the way to it answered. Never a header, a query or a credential."""
    from botocore.exceptions import ClientError

    code = _code(error)
    if code in ("NoSuchKey", "404", "NotFound"):
        return FileNotFoundError(errno.ENOENT, f"{doing}: no such object")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExists(f"{doing}: it is there already", shared_by_all_ranks=False)
    if isinstance(error, ClientError):
        # Only these two: the rest of such an answer can hold the string that was signed.
        return final(doing, code, str(error.response.get("Error", {}).get("Message", "")), tried)
    hint = CREDENTIALS if "redential" in f"{type(error).__name__}" else ENDPOINT
    return StorageError(f"{doing}: {tried}{clean(error)}; {hint}", shared_by_all_ranks=False)


def final(doing: str, code: str, message: str, tried: str = "") -> Refusal:
    hint = _HINTS.get("AccessDenied" if code == "403" else code, "")
    reason = message.strip().rstrip(".") or "no reason given"
    return Refusal(f"{doing}: {tried}S3 answered {code} ({reason}){'; ' if hint else ''}{hint}", code)


def clean(error: Exception) -> str:
    """An error's text without the queries and the user names of URLs."""
    text = re.sub(r"\?[^\s\"']*", "", str(error))
    return re.sub(r"//[^/@\s]*@", "//", text).strip().rstrip(".")
