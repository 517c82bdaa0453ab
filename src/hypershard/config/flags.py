"""Command-line flags generated from the schema: names, types, groups and help come from there alone."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .schema import SECTIONS, SETTINGS

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_RUN_FILE_WORDS = ("run", "run_file", "runfile", "recipe", "conf", "config_file", "yaml")  # what people call --config
_TITLES = {
    "model": "model: its shape; --model NAME fills it, flags change single values",
    "data": "data: what is read and how much goes into a step",
    "optim": "optim: AdamW and its learning-rate schedule",
    "parallel": "parallel: how the model is spread, what is traded for memory",
    "train": "train: how long, how often, from where",
    "checkpoint": "checkpoint: what survives, where, how often",
    "adapters": "adapters: LoRA, for fine-tuning with little memory",
    "learning": "learning: what the loss asks for",
    "report": "report: where the run lives and its numbers go",
}


@functools.cache
def _types() -> dict[str, tuple[type, bool]]:
    """Setting name -> (its plain type, whether None is allowed)."""
    found: dict[str, tuple[type, bool]] = {}
    for cls in SECTIONS.values():
        for name, hint in typing.get_type_hints(cls).items():
            if isinstance(hint, types.UnionType):
                # `int | str | None`: a number, or one of the setting's words.
                plain = next(part for part in typing.get_args(hint) if part is not type(None))
                found[name] = (plain, True)
            else:
                found[name] = (hint, False)
    return found


def coerce(name: str, value: Any, *, where: str) -> Any:
    """Turn a flag's text or a YAML value into the setting's type, within its limits.

    Raises ConfigError naming `where` the value stood, what was found and what is accepted.
    """
    plain, optional = _types()[name]
    meta = SETTINGS[name][1].metadata
    if isinstance(value, str) and value.strip() in (*meta["words"], *meta["choices"]):  # 'none' may be one
        return value.strip()
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null", "")):
        if not optional:
            raise ConfigError(f"{where}: {name} cannot be empty")
        return None
    text = str(value).strip()
    if meta["choices"]:
        text = meta["aliases"].get(text.lower(), text)
        if text not in meta["choices"]:
            accepted = ", ".join((*meta["choices"], *(word for word in meta["aliases"] if word.isdigit())))
            raise ConfigError(f"{where}: found {value!r}, expected one of {accepted}{_nearest(text, meta['choices'])}")
        return text
    if plain is str:
        return str(value)
    parsed = _number(plain, value, text)
    if parsed is None:
        expected = {bool: "1/0/true/false", int: "a whole number", float: "a number"}[plain]
        expected = " or ".join((expected, *(repr(word) for word in meta["words"])))
        raise ConfigError(f"{where}: found {value!r}, expected {expected}")
    low, high = meta["minimum"], meta["maximum"]
    if (low is not None and parsed < low) or (high is not None and parsed > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{where}: found {value!r}, expected {limits}")
    return parsed


def _number(plain: type, value: Any, text: str) -> Any:
    if plain is bool:
        lowered = text.lower()
        return True if lowered in _TRUE else False if lowered in _FALSE else None
    if isinstance(value, bool):
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    if plain is float:
        return None if math.isnan(number) else number
    return int(number) if number.is_integer() else None  # 1e3 and 1000 are both whole


def nearest_setting(name: str, others: Sequence[str] = ()) -> str:
    """A hint like "; did you mean --num_layers?" or nothing."""
    if name in _RUN_FILE_WORDS and "config" in others:
        return "; did you mean --config, which takes a run file?"
    return _nearest(name, (*SETTINGS, *others), prefix="--")


def _nearest(word: str, known: Sequence[str], *, prefix: str = "") -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{match[0]}?" if match else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's formatter with room for the flags' names; description and epilog keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one flag per setting, grouped by section. Values stay text; `coerce` turns them into settings."""
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(_TITLES[section])
        for name, (owner, field) in SETTINGS.items():
            if owner == section and name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                _add_setting(group, name, field.default, field.metadata)


def _add_setting(group: Any, name: str, default: Any, meta: Any) -> None:
    plain, _ = _types()[name]
    shown = {True: "1", False: "0"}.get(default, default) if isinstance(default, bool) else default
    notes = [] if default is None or default == "" else [f"default: {shown}"]
    if meta["unit"]:
        notes.append(meta["unit"])
    help_text = meta["help"] + (f" ({', '.join(notes)})" if notes else "")
    bare = "1" if plain is bool else meta["value_when_bare"]
    group.add_argument(
        f"--{name}",
        default=argparse.SUPPRESS,
        metavar="|".join(meta["choices"]) or {bool: "0|1", int: "N", float: "X", str: "TEXT"}[plain],
        help=help_text.replace("%", "%%"),
        **({"nargs": "?", "const": bare} if bare is not None else {}),
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, also_known: Sequence[str] = ()
) -> argparse.Namespace:
    """Parse `argv`; an unknown flag or a stray word is fatal and names the nearest flag."""
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0]
        if word.startswith("--"):
            name = word[2:].split("=", 1)[0]
            raise ConfigError(f"unknown flag --{name}{nearest_setting(name, also_known)}")
        raise ConfigError(f"unexpected word {word!r}; every setting is a flag (see --help)")
    return namespace
