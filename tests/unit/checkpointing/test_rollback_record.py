"""What rollbacks left behind is there after a restart, for the checkpoints that do not say it themselves."""

from __future__ import annotations

import logging

from sharpwatch.checkpointing.rollback_record import RollbackRecord

RECORD = RollbackRecord([[(3, 5)]], frozenset({"at-4", "at-8"}), frozenset({"at-8"}))


def test_it_is_read_as_it_was_written(tmp_path):
    assert RollbackRecord.read(tmp_path) == RollbackRecord()
    RECORD.write(tmp_path)
    found = RollbackRecord.read(tmp_path)
    assert [[tuple(one) for one in ranges] for ranges in found.left_out] == RECORD.left_out
    assert (found.older, found.undone) == (RECORD.older, RECORD.undone)


def test_a_checkpoint_that_is_saved_again_is_not_older_any_more(tmp_path):
    RECORD.write(tmp_path)
    RollbackRecord.read(tmp_path).saved(tmp_path, "at-8")
    found = RollbackRecord.read(tmp_path)
    assert (found.older, found.undone) == ({"at-4"}, set())
    assert found.left_out_beside("at-8") == ()
    assert found.left_out_beside("at-4") == [[[3, 5]]]


def test_an_undone_checkpoint_is_taken_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        RECORD.left_out_beside("at-4")
        assert caplog.messages == []
        assert RECORD.left_out_beside("at-8") == RECORD.left_out
    assert "at-8 was undone" in caplog.text


def test_what_is_newer_than_where_a_rollback_goes_is_undone():
    ages = {"at-4": 4, "at-8": 8, "at-12": 12, "at-16": 16}
    after = RECORD.after_rollback("at-12", ages, [[(3, 7)]])
    assert (after.left_out, after.older, after.undone) == ([[(3, 7)]], set(ages), {"at-8", "at-16"})
    assert after.newest(ages) == "at-12"
    assert after.newest({"at-16": 16}) is None
    assert RollbackRecord().newest(ages) == "at-16"


def test_what_cannot_be_read_or_written_is_logged_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "sharpwatch.json").write_text("{half")
    assert RollbackRecord.read(tmp_path) == RollbackRecord()
    assert "cannot read the rollback record" in caplog.text
    RECORD.write(tmp_path / "not there")
    assert "cannot write the rollback record" in caplog.text
