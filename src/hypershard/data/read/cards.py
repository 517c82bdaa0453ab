"""A data card: the YAML at the top of a hub data set's README.md says which configurations it has and their files.

https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError

_FRONT_MATTER = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class CardSplit:
    """A split as a card names it, and the globs of its files. `name` None: the files' names tell."""

    name: str | None
    globs: tuple[str, ...]


def card_configs(readme: str, *, where: str) -> list[dict[str, Any]]:
    """The configurations of a README.md; none when it has no card. DataError: a card that is not one."""
    import yaml

    front = _FRONT_MATTER.match(readme)
    if front is None:
        return []
    try:
        card = yaml.safe_load(front.group(1))
    except yaml.YAMLError as error:
        raise DataError(f"{where}: the data card at its top is not YAML ({error}); mend it or take it out") from error
    configs = card.get("configs") if isinstance(card, dict) else None
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise DataError(f"{where}: found configs: {str(configs)[:100]}; expected a list of mappings with config_name")
    return configs


def choose_config(
    configs: Sequence[dict[str, Any]], *, dataset: str, dataset_config_name: str | None
) -> dict[str, Any] | None:
    """The configuration asked for; without a name the default or only one. None: the data set has none, and none is
    asked for. DataError lists those there are."""
    names = [config_name(one) for one in configs]
    if dataset_config_name is not None:
        if dataset_config_name in names:
            return configs[names.index(dataset_config_name)]
        raise DataError(
            f"--dataset_config_name={dataset_config_name}: --dataset={dataset} has no such configuration; "
            f"expected {_listed(names) if names else 'the flag left out: it has none'}"
        )
    if len(configs) <= 1:
        return configs[0] if configs else None
    for is_default in (lambda one: one.get("default") is True, lambda one: config_name(one) == "default"):
        if chosen := [one for one in configs if is_default(one)]:
            return chosen[0]
    raise DataError(
        f"--dataset={dataset}: found {len(names)} configurations and no default; "
        f"--dataset_config_name chooses one of {_listed(names)}"
    )


def config_name(config: dict[str, Any]) -> str:
    return str(config.get("config_name", "default"))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def config_splits(config: dict[str, Any], *, where: str) -> list[CardSplit]:
    """The splits of a configuration and their globs, relative to the data set. DataError: another shape."""
    data_dir = str(config.get("data_dir") or "").strip("/")
    data_files = config.get("data_files")
    if data_files is None:
        return [CardSplit(name=None, globs=(_below(data_dir, "**"),))]
    if isinstance(data_files, str):
        shaped: list[tuple[str | None, Any]] = [(None, data_files)]
    elif isinstance(data_files, dict):
        shaped = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(one, str) for one in data_files):
        shaped = [(None, data_files)]
    elif isinstance(data_files, list) and all(isinstance(one, dict) and "path" in one for one in data_files):
        shaped = [(one.get("split"), one["path"]) for one in data_files]
    else:
        shaped = [(None, None)]
    splits = []
    for name, listed in shaped:
        paths = [listed] if isinstance(listed, str) else listed
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DataError(
                f"{where}: found data_files {str(data_files)[:100]} for {config_name(config)}; "
                "expected globs, or a list of split and path"
            )
        splits.append(CardSplit(name=name, globs=tuple(_below(data_dir, path) for path in paths)))
    return splits


def _below(folder: str, glob: str) -> str:
    glob = glob.removeprefix("./")
    return f"{folder}/{glob}" if folder else glob


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The paths that a card's glob means: `*` and `?` stay inside a folder, `**` does not; a folder means all in it."""
    inside = "" if set(glob) & set("*?[") else "(?:/.*)?"
    pattern = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^]/]+\]|.", glob.rstrip("/"), re.DOTALL):
        special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        if token in special:
            pattern += special[token]
        elif len(token) > 1:
            pattern += token.replace("[!", "[^", 1)
        else:
            pattern += re.escape(token)
    return re.compile(pattern + inside, re.DOTALL)
