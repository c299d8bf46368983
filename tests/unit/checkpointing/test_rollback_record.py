"""What rollbacks left behind is there after a restart, for the checkpoints that do not say it themselves."""

from __future__ import annotations

import logging

from sharpwatch.checkpointing.rollback_record import RollbackRecord

NOTED = RollbackRecord([[(3, 5)]], frozenset({"at-4", "at-8"}), frozenset({"at-8"}))


def test_it_is_read_as_it_was_noted(tmp_path):
    assert RollbackRecord.of(tmp_path) == RollbackRecord()
    NOTED.note(tmp_path)
    found = RollbackRecord.of(tmp_path)
    assert [[tuple(one) for one in ranges] for ranges in found.left_out] == NOTED.left_out
    assert (found.older, found.undone) == (NOTED.older, NOTED.undone)


def test_a_checkpoint_that_is_saved_anew_stands_for_itself(tmp_path):
    NOTED.note(tmp_path)
    RollbackRecord.of(tmp_path).saved(tmp_path, "at-8")
    found = RollbackRecord.of(tmp_path)
    assert (found.older, found.undone) == ({"at-4"}, set())
    assert found.of_checkpoint("at-8") == ()
    assert found.of_checkpoint("at-4") == [[[3, 5]]]


def test_an_undone_checkpoint_is_taken_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        NOTED.of_checkpoint("at-4")
        assert caplog.messages == []
        assert NOTED.of_checkpoint("at-8") == NOTED.left_out
    assert "at-8 was undone" in caplog.text


def test_what_is_newer_than_where_a_rollback_goes_is_undone():
    ages = {"at-4": 4, "at-8": 8, "at-12": 12, "at-16": 16}
    after = NOTED.after("at-12", ages, [[(3, 7)]])
    assert (after.left_out, after.older, after.undone) == ([[(3, 7)]], set(ages), {"at-8", "at-16"})
    assert after.newest(ages) == "at-12"
    assert after.newest({"at-16": 16}) is None
    assert RollbackRecord().newest(ages) == "at-16"


def test_what_cannot_be_read_or_written_is_told_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "sharpwatch.json").write_text("{half")
    assert RollbackRecord.of(tmp_path) == RollbackRecord()
    assert "could not be read" in caplog.text
    NOTED.note(tmp_path / "not there")
    assert "is not noted" in caplog.text
