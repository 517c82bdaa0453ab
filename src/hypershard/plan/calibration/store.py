"""Calibrations as files: a folder with one JSON each, a person's own, which every plan reads."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import typing
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...storage import make_directory, read_json, readable_errors, write_json
from .calibration import Calibration, Setup

_MAY_BE_ZERO = "iqr_seconds"


def default_folder() -> Path:
    """$XDG_CONFIG_HOME/hypershard/calibrations, where it is not set under ~/.config."""
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(root).expanduser() / "hypershard" / "calibrations"


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write it and return the file. One of the same run with the same settings is replaced. Raises StorageError."""
    make_directory(folder)
    run = re.sub(r"[^A-Za-z0-9_.-]+", "-", calibration.run).strip(".-") or "run"
    digest = hashlib.sha256(f"{calibration.run} {calibration.gpu} {calibration.setup!r}".encode()).hexdigest()
    path = folder / f"{run}-{digest[:8]}.json"
    write_json(path, dataclasses.asdict(calibration))
    return path


def load_calibrations(folder: Path) -> tuple[Calibration, ...]:
    """All of a folder, none where it does not exist. Raises ConfigError naming a file that is damaged."""
    with readable_errors(folder, "reading"):
        paths = sorted(folder.glob("*.json")) if folder.exists() else []
    return tuple(_load(path) for path in paths)


def _load(path: Path) -> Calibration:
    try:
        content = read_json(path)
        found = Calibration(**{**content, "setup": Setup(**content["setup"])})
        _check(found)
        _check(found.setup)
    except OSError as error:
        raise ConfigError(f"--calibrations: {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--calibrations: {path} is damaged or was written by another version ({error}); delete it and calibrate "
            f"again (hypershard plan --calibrate RUN), or plan without any (--calibrations=none)"
        ) from None
    return found


def _check(record: Calibration | Setup) -> None:
    """Raises ValueError for a value that is not of its field's type, or a number that measures nothing."""
    for name, hint in typing.get_type_hints(type(record)).items():
        value: Any = getattr(record, name)
        if not isinstance(value, hint):
            raise ValueError(f"{name}: found {value!r}")
        if isinstance(value, float | int) and not isinstance(value, bool):
            least = 0 if name == _MAY_BE_ZERO else math.nextafter(0, 1)
            if not least <= value < math.inf:
                raise ValueError(f"{name}: found {value!r}")
