"""What the launchers' flags have in common."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError


def named_values(flag: str, words: Sequence[str], *, sign: str = "=", expected: str = "NAME=VALUE") -> dict[str, str]:
    """A repeatable flag's words as names with values. Raises ConfigError for one that is no pair, or stands twice."""
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition(sign)
        if not (name and separator):
            raise ConfigError(f"{flag} {name}: expected {expected}")  # without what may be a secret behind it
        if name in found:
            raise ConfigError(f"{flag} {name}: given twice")
        found[name] = value
    return found
