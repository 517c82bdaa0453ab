"""Is a request one that AWS would take? Judged by the service's own description, without asking the service.

botocore checks names and types only; an instance type that does not exist, a name or a value that is too long pass it
and are refused after the upload, or after the wait for machines. Here enums, patterns, lengths, ranges and unions are
checked too. What a description does not say (that two fields exclude each other, that a bucket exists) stays with
the service.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

_MOST_SHOWN = 80  # characters of a value in a message
_MOST_NAMED = 8  # accepted values listed in full
# POSIX classes as Java knows them, all ASCII.
_POSIX = {
    "Alnum": "a-zA-Z0-9",
    "Alpha": "a-zA-Z",
    "Digit": "0-9",
    "Upper": "A-Z",
    "Lower": "a-z",
    "ASCII": "\\x00-\\x7f",
}


@dataclass(frozen=True)
class Violation:
    """One field that the service would refuse. `path` is dotted, list positions in brackets, map keys as they are."""

    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}"


def validate(request: Mapping[str, Any], operation: str, *, service: str, flags: Mapping[str, str]) -> None:
    """Raises ConfigError naming every field of `request` that `operation` of `service` would refuse.

    `flags`: path -> the flag to change, for the fields that a user sets by one.
    """
    found = violations(request, operation, service=service)
    if found:
        lines = [f"{one}{_hint(one.path, flags)}" for one in found]
        raise ConfigError(f"{operation} would be refused: " + "; ".join(lines))


def _hint(path: str, flags: Mapping[str, str]) -> str:
    for prefix, flag in flags.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return f" ({flag})"
    return ""


def violations(request: Mapping[str, Any], operation: str, *, service: str) -> tuple[Violation, ...]:
    """Every field of `request` that `operation` (CreateTrainingJob) of `service` (sagemaker) would refuse."""
    return tuple(_check(input_shape(operation, service=service), request, ""))


def input_shape(operation: str, *, service: str) -> Any:
    """botocore's description of what `operation` takes. Reads no configuration and needs no credentials."""
    return _service_model(service).operation_model(operation).input_shape


@functools.cache
def _service_model(service: str) -> Any:
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    return ServiceModel(Loader().load_service_model(service, "service-2"), service)


def _check(shape: Any, value: Any, path: str) -> Iterator[Violation]:
    kind = shape.type_name
    if getattr(shape, "is_document_type", False):
        return
    accepted, word = _TYPES[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "boolean"):
        yield Violation(path or "the request", f"a {type(value).__name__}", word)
        return
    if check := _CHECKS.get(kind):
        yield from check(shape, value, path)


def _check_structure(shape: Any, value: Mapping[str, Any], path: str) -> Iterator[Violation]:
    members = shape.members
    for name in shape.required_members:
        # botocore fills these in itself.
        if name not in value and not members[name].metadata.get("idempotencyToken"):
            yield Violation(_join(path, name), "nothing", "a value")
    if getattr(shape, "is_tagged_union", False) and len(value) != 1:
        yield Violation(path, f"{len(value)} of its members", f"exactly one of {', '.join(members)}")
    for name, member_value in value.items():
        if name not in members:
            near = difflib.get_close_matches(str(name), members, n=1)
            yield Violation(_join(path, name), "a field the service does not know", near[0] if near else "none here")
        else:
            yield from _check(members[name], member_value, _join(path, name))


def _check_list(shape: Any, value: Any, path: str) -> Iterator[Violation]:
    yield from _check_size(shape, len(value), path, "entries")
    for position, entry in enumerate(value):
        yield from _check(shape.member, entry, f"{path}[{position}]")


def _check_map(shape: Any, value: Mapping[str, Any], path: str) -> Iterator[Violation]:
    yield from _check_size(shape, len(value), path, "entries")
    for key, entry in value.items():
        yield from _check(shape.key, key, f"{path} (the key)")
        yield from _check(shape.value, entry, _join(path, key))


def _check_string(shape: Any, value: str, path: str) -> Iterator[Violation]:
    sizes = tuple(_check_size(shape, len(value), path, "characters"))
    if sizes:
        yield from sizes
        return
    if shape.enum and value not in shape.enum:
        near = difflib.get_close_matches(value, shape.enum, n=3) or shape.enum
        words = "one of" if len(shape.enum) <= _MOST_NAMED else "a value such as"
        yield Violation(path, _shown(value), f"{words} {', '.join(near[:_MOST_NAMED])}")
    pattern = shape.metadata.get("pattern")
    readable = _compiled(pattern) if pattern else None
    if readable is not None and not readable.fullmatch(value):
        shown = "a value that is not shown" if shape.metadata.get("sensitive") else _shown(value)
        yield Violation(path, shown, f"the pattern {pattern}")


def _check_number(shape: Any, value: float, path: str) -> Iterator[Violation]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and value < least:
        yield Violation(path, f"{value:g}", f"at least {least}")
    if most is not None and value > most:
        yield Violation(path, f"{value:g}", f"at most {most}")


def _check_size(shape: Any, size: int, path: str, unit: str) -> Iterator[Violation]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and size < least:
        yield Violation(path, f"{size} {unit}", f"at least {least}")
    if most is not None and size > most:
        yield Violation(path, f"{size} {unit}", f"at most {most}")


_TYPES: dict[str, tuple[Any, str]] = {
    "structure": (Mapping, "a structure"),
    "map": (Mapping, "a map"),
    "list": ((list, tuple), "a list"),
    "string": (str, "a text"),
    "integer": (int, "a whole number"),
    "long": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "double": ((int, float), "a number"),
    "boolean": (bool, "true or false"),
    "timestamp": (object, "an instant"),
    "blob": (object, "bytes"),
}
_CHECKS: dict[str, Callable[[Any, Any, str], Iterator[Violation]]] = {
    "structure": _check_structure,
    "map": _check_map,
    "list": _check_list,
    "string": _check_string,
    "integer": _check_number,
    "long": _check_number,
    "float": _check_number,
    "double": _check_number,
}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _shown(value: str) -> str:
    return repr(value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}…")


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """The pattern, written for Java, as Python reads it; None where that cannot be done, and the service must judge.

    AWS means the whole value, with or without ^ and $.
    """
    # UTF-16 halves, by which Java writes what lies above 0xFFFF.
    text = pattern.replace(r"\uD800\uDC00-\uDBFF\uDFFF", r"\U00010000-\U0010FFFF")
    try:
        return re.compile(re.sub(r"\\p\{(\w+)\}", lambda match: _characters(match[1]), text))
    except (re.error, KeyError):
        return None


@functools.cache
def _characters(name: str) -> str:
    """The inside of a character class with what Java calls `\\p{name}`. Raises KeyError for a class not known here."""
    if name in _POSIX:
        return _POSIX[name]
    ranges = _ranges_by_category()
    spans = [span for category, found in ranges.items() if category.startswith(name) for span in found]
    if not spans:
        raise KeyError(name)
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in spans)


@functools.cache
def _ranges_by_category() -> dict[str, list[tuple[int, int]]]:
    """Unicode general category -> its runs of code points. Takes a third of a second, so only where it is asked for."""
    found: dict[str, list[tuple[int, int]]] = {}
    first, former = 0, unicodedata.category("\0")
    for code in range(1, sys.maxunicode + 2):
        category = unicodedata.category(chr(code)) if code <= sys.maxunicode else ""
        if category != former:
            found.setdefault(former, []).append((first, code - 1))
            first, former = code, category
    return found
