"""Where values come from: defaults < model file < run file < flags; each value remembers its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .flags import coerce, nearest_setting
from .schema import SECTIONS, SETTINGS, Config

MODEL_KEY = "model"  # in a run file, a text under this key names a model file, a mapping is the model section


@dataclass(frozen=True)
class Layer:
    """One source of values: `label` is how errors and --show_config name it."""

    label: str
    values: Mapping[str, Any]
    is_flags: bool = False


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each setting, the label of the layer its value came from."""

    config: Config
    sources: Mapping[str, str]


def read_yaml(path: Path) -> tuple[dict[str, Any], str | None]:
    """The settings in a YAML file, sections flattened, and the model file it names (or None).

    Raises ConfigError for a missing or malformed file and for a key that is no setting.
    """
    try:
        return parse_yaml(path.read_text(), where=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def read_run_file(path: Path) -> tuple[dict[str, Any], str | None]:
    """`read_yaml` of --config. Raises ConfigError as that does; a file that cannot be read names the flag."""
    try:
        text = path.expanduser().read_text()
    except OSError as error:
        raise ConfigError(f"--config={path}: {error.strerror}; expected a run file, YAML of settings") from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> tuple[dict[str, Any], str | None]:
    """The same for the text of a file; `where` it came from is named in errors."""
    import yaml  # 20 ms that --help does not need to wait for

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: found a {type(content).__name__}, expected 'name: value' lines")
    model_name = content.pop(MODEL_KEY) if isinstance(content.get(MODEL_KEY), str) else None
    flat: dict[str, Any] = {}
    for key, value in content.items():
        entries = value.items() if key in SECTIONS and isinstance(value, dict) else ((key, value),)
        for name, setting_value in entries:
            if name not in SETTINGS:
                raise ConfigError(f"{where}: unknown key {name!r}{nearest_setting(str(name))}")
            if name in flat:
                raise ConfigError(f"{where}: {name} stands twice")
            flat[name] = setting_value
    return flat, model_name


def resolve(*layers: Layer) -> Resolved:
    """Lay `layers` over the defaults, later ones winning. Raises ConfigError for a value out of its type or limits."""
    values: dict[str, Any] = {}
    sources = dict.fromkeys(SETTINGS, "default")
    for layer in layers:
        for name, value in layer.values.items():
            where = f"--{name}" if layer.is_flags else f"{layer.label}: {name}"
            values[name] = coerce(name, value, where=where)
            sources[name] = layer.label
    sections = {
        section: cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})
        for section, cls in SECTIONS.items()
    }
    return Resolved(Config(**sections), sources)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML by section; read back by `read_yaml` it gives the same configuration."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


def show(resolved: Resolved) -> str:
    """One line per setting: name, value, source; for --show_config."""
    lines = []
    for section, values in dataclasses.asdict(resolved.config).items():
        lines.append(f"{section}:")
        lines += [f"  {name:<28} {value!s:<24} {resolved.sources[name]}" for name, value in values.items()]
    return "\n".join(lines)
