"""One process at a time: whoever comes and goes, where there are locks and where there are none."""

from __future__ import annotations

import errno
import fcntl
import logging
import threading
from pathlib import Path

import pytest

from hypershard import storage
from hypershard.errors import StorageError
from hypershard.storage import exclusive


def test_one_at_a_time(tmp_path: Path) -> None:
    order = []
    waits = threading.Event()

    def second() -> None:
        waits.set()
        with exclusive(tmp_path / ".lock", doing="making it"):
            order.append("second")

    with exclusive(tmp_path / ".lock", doing="making it"):
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(10)
        other.join(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"] and list(tmp_path.iterdir()) == []


def test_no_two_hold_it_however_many_come_and_go(tmp_path: Path) -> None:
    holding, most, total = [0], [0], [0]

    def work() -> None:
        for _ in range(20):
            with exclusive(tmp_path / ".lock", doing="making it"):
                holding[0] += 1
                most[0] = max(most[0], holding[0])
                total[0] += 1
                holding[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most[0], total[0]) == (1, 80) and list(tmp_path.iterdir()) == []


def test_an_error_of_the_work_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="of the work"), exclusive(tmp_path / ".lock", doing="making it"):
            raise OSError("of the work")  # no StorageError: it is not the lock's
    with pytest.raises(StorageError, match=r"locking .*missing"), exclusive(tmp_path / "missing" / ".lock", doing="it"):
        pass


def test_a_file_system_without_locks_is_said_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(storage.logger, "propagate", True)
    with caplog.at_level(logging.WARNING), exclusive(tmp_path / ".lock", doing="making bins"):
        assert "without locks" in caplog.text and "making bins" in caplog.text
