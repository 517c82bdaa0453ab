from __future__ import annotations

import errno
import fcntl
import threading

import pytest
from data_texts import names_in

from hypershard.data.bins import unfinished
from hypershard.data.bins.unfinished import Unfinished, locked
from hypershard.errors import DataError, StorageError


def test_one_at_a_time(tmp_path):
    order = []
    may_end = threading.Event()

    def second():
        with locked(tmp_path / "bins"):
            order.append("second")

    with locked(tmp_path / "bins"):
        other = threading.Thread(target=second)
        other.start()
        may_end.wait(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"] and names_in(tmp_path) == []


def test_no_two_hold_it_however_many_come_and_go(tmp_path):
    holding, most, total = [0], [0], [0]

    def work():
        for _ in range(20):
            with locked(tmp_path / "bins"):
                holding[0] += 1
                most[0] = max(most[0], holding[0])
                total[0] += 1
                holding[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most[0], total[0]) == (1, 80) and names_in(tmp_path) == []


def test_a_file_system_without_locks_is_said_and_not_fatal(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    told = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(unfinished.logger, "warning", told.append)
    with locked(tmp_path / "bins"):
        assert "without locks" in told[0]


def test_work_is_found_again_by_its_identity(tmp_path):
    work = Unfinished(tmp_path / "bins", identity="this")
    assert work.found is None
    work.take({"done": 0})
    (work.folder / ".journal.json.1.tmp").write_text("half a jour")
    work.note({"done": 3})
    again = Unfinished(tmp_path / "bins", identity="this")
    assert again.found == {"done": 3}
    again.take(again.found)
    assert names_in(again.folder) == ["journal.json"]
    again.publish()
    assert names_in(tmp_path) == ["bins"] and names_in(tmp_path / "bins") == []


def test_other_work_is_deleted(tmp_path):
    work = Unfinished(tmp_path / "bins", identity="this")
    work.take({"done": 3})
    other = Unfinished(tmp_path / "bins", identity="that")
    assert other.found is None and names_in(other.folder) == []


def test_a_second_owner_stops_the_first(tmp_path):
    first = Unfinished(tmp_path / "bins", identity="this")
    first.take({})
    second = Unfinished(tmp_path / "bins", identity="this")
    second.take({})
    for step in (lambda: first.note({"done": 1}), first.publish):
        with pytest.raises(StorageError, match="another process makes"):
            step()
    second.note({"done": 2})
    assert Unfinished(tmp_path / "bins", identity="this").found == {"done": 2}


def test_a_name_that_was_taken_meanwhile_is_refused(tmp_path):
    work = Unfinished(tmp_path / "bins", identity="this")
    work.take({})
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "something").touch()
    with pytest.raises(DataError, match="something appeared there meanwhile"):
        work.publish()
