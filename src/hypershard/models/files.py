"""Model files: model_configs/NAME.yaml in the repository, or the copies that an installed package carries."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import ConfigError

_FOLDERS = (Path(__file__).parents[3] / "model_configs", Path(__file__).parents[1] / "model_configs")


def available_models() -> list[str]:
    """Names that `model_file` finds, sorted."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")})


def model_file(name: str) -> Path:
    """The file of a model: `name` itself when it is a path to a .yaml file, else NAME.yaml of the model files.

    Raises ConfigError for a path that does not exist, and for an unknown name with the nearest known ones.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"--model={name}: there is no such file")
        return path
    for folder in _FOLDERS:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    known = available_models()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(known)}"
    raise ConfigError(f"--model={name}: no model file of this name{hint}")
