"""Work that outlives the process that does it: a hidden folder beside the output, its lock, and how far it has come.

    .NAME.lock      held by the process that makes NAME, gone when that is done
    .NAME.partial   the files so far, and journal.json: whose work it is and up to where it can be trusted

A process that finds a journal of the same work goes on from there; leftovers of other work are deleted.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ...errors import DataError, StorageError
from ...log import logger
from ...storage import exclusive, make_directory, read_json, readable_errors, remove_tree, sync_directory, write_json

JOURNAL_FILE = "journal.json"


def locked(output: Path) -> AbstractContextManager[None]:
    """Be the only process that makes `output`; see `storage.exclusive`."""
    return exclusive(output.with_name(f".{output.name}.lock"), doing=f"making {output}")


class Unfinished:
    """The folder in which `output` is made, and its journal. Make one while `output` is locked.

    `identity` names the work: input, encoding, options. Work on another one is deleted.
    """

    def __init__(self, output: Path, *, identity: str):
        self._output = output
        self._identity = identity
        self._owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self.folder = output.with_name(f".{output.name}.partial")
        self.found = self._found()
        if self.found is None:
            self.restart()

    def _found(self) -> Any:
        """What an earlier process noted last, None when it did not get so far or did other work."""
        if not self.folder.exists():
            return None
        try:
            journal = read_json(self.folder / JOURNAL_FILE)
            if journal["identity"] == self._identity:
                return journal["value"]
            logger.info(f"deleting {self.folder}: it was begun with other files or options")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning(f"deleting {self.folder}: {JOURNAL_FILE} is damaged ({error})")
        return None

    def restart(self) -> None:
        """Empty the folder."""
        self.found = None
        remove_tree(self.folder)
        make_directory(self.folder)

    def take(self, value: Any) -> None:
        """Note `value` as this process's: any other one that thinks the folder its own stops at its next note."""
        with readable_errors(self.folder, "writing"):
            for path in self.folder.glob(".*.tmp"):  # a process was killed while it wrote one of its small files
                path.unlink()
        self._write(value)

    def note(self, value: Any) -> None:
        """Replace the journal's value. What it speaks of must be on the disk by now."""
        self.require_ownership()
        self._write(value)

    def _write(self, value: Any) -> None:
        write_json(self.folder / JOURNAL_FILE, {"identity": self._identity, "owner": self._owner, "value": value})

    def require_ownership(self) -> None:
        """StorageError when another process has taken the folder, which locks prevent where there are any."""
        try:
            owner = read_json(self.folder / JOURNAL_FILE)["owner"]
        except (OSError, ValueError) as error:
            owner = f"nobody ({error})"
        if owner != self._owner:
            raise StorageError(
                f"{self.folder} now belongs to {owner}, expected {self._owner}: another process makes {self._output}, "
                "on a file system whose locks do not hold; run one at a time",
                shared_by_all_ranks=False,
            )

    def publish(self) -> None:
        """Give the folder its name. DataError: something is there already."""
        self.require_ownership()
        with readable_errors(self._output, "writing"):
            try:
                self.folder.rename(self._output)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise DataError(f"{self._output}: something appeared there meanwhile; expected nothing") from error
                raise
            # Until now it would have been needed; a process killed here leaves a file that harms nothing.
            (self._output / JOURNAL_FILE).unlink()
            sync_directory(self._output.parent)

    def delete(self) -> None:
        remove_tree(self.folder)
