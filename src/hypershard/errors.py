"""Every error a user can meet, and who is told what.

    HypershardError                 anything this project raises on purpose; exit code 1
    ├── UserError                   the user can mend it; the message names found, expected, flag; exit code 2
    │   ├── ConfigError             a flag, a YAML key, or a combination of them
    │   ├── DataError               a data set, token bin or tokenizer
    │   ├── CheckpointError         a checkpoint that is missing or of another model
    │   │   └── DamagedCheckpoint   bytes that are not as they were saved; an older one may do
    │   └── StorageError            a disk or bucket that refuses (full, not writable, not shared)
    └── TrainingDiverged            the loss or the gradient stopped being a number; exit code 3

An error is reported once. `shared_by_all_ranks` says that every rank raises the same one at the same
place (a wrong flag, a missing file on a shared disk), so only rank 0 prints it; any other error is
printed by the rank that met it, with its number.
"""

from __future__ import annotations


class HypershardError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1
    shared_by_all_ranks = True

    def __init__(self, message: str, *, shared_by_all_ranks: bool | None = None):
        super().__init__(message)
        if shared_by_all_ranks is not None:
            self.shared_by_all_ranks = shared_by_all_ranks


class UserError(HypershardError):
    """Something the user can change; the message says what was found, what was expected, and where."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a YAML key, or a combination of them."""


class DataError(UserError):
    """A data set, token bin or tokenizer that cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint that is missing or belongs to another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not as they were saved; another one may be whole."""


class StorageError(UserError):
    """A disk or bucket that refuses: full, not writable, not shared between nodes."""


class TrainingDiverged(HypershardError):
    """The loss or the gradient stopped being a number too often."""

    exit_code = 3
