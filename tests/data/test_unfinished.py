from __future__ import annotations

import pytest
from data_texts import names_in

from hypershard.data.bins.unfinished import Unfinished
from hypershard.errors import DataError, StorageError


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
