"""What a loop says of its checkpoints, what of that is told, and which of them are still there."""

from __future__ import annotations

import pytest

from sharpwatch.agent.checkpoint_log import CheckpointLog


@pytest.fixture
def log():
    return CheckpointLog()


def test_news_is_told_once_and_of_each_checkpoint_only_the_newest(log):
    log.saved(1, "a", look=True)
    log.saved(2, "b", look=True)
    log.deleted("a")
    log.saved(3, "b", look=True)  # over the other
    assert log.take() == (((3, "b"),), ("a",))
    assert log.take() == ((), ())
    log.deleted("b")
    log.saved(4, "b", look=True)
    assert log.take() == (((4, "b"),), ())


def test_a_file_that_was_there_and_is_not_any_more_was_deleted(log, tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for step, path in enumerate(paths):
        path.mkdir()
        log.saved(step, str(path), look=True)
    log.take()
    paths[1].rmdir()
    log.saved(4, f"file://{paths[0]}", look=True)
    assert log.take() == (((4, f"file://{paths[0]}"),), (str(paths[1]),))
    assert log.is_gone(str(paths[1]))
    assert not log.is_gone(str(paths[2]))
    log.saved(5, str(paths[2]), look=True)
    assert log.take() == (((5, str(paths[2])),), ())  # told once


def test_what_was_never_seen_may_be_elsewhere_or_still_in_writing(log, tmp_path):
    path = tmp_path / "a"
    log.saved(1, str(path), look=True)
    log.saved(2, "s3://bucket/run", look=True)
    log.saved(3, "step-3", look=True)
    assert log.take()[1] == ()
    assert not log.is_gone(str(path))
    assert not log.is_gone("s3://bucket/run")
    path.mkdir()
    log.saved(4, "step-4", look=True)
    path.rmdir()
    log.saved(5, "step-5", look=True)
    assert log.take()[1] == (str(path),)


def test_a_checkpoint_of_an_earlier_attempt_is_gone_if_its_folder_lacks_it(log, tmp_path):
    (tmp_path / "there").mkdir()
    assert not log.is_gone(str(tmp_path / "there"))
    assert log.is_gone(str(tmp_path / "gone"))
    assert not log.is_gone("/no/such/folder/step-3")  # of another machine, perhaps
    assert not log.is_gone("step-3")
    assert not log.is_gone("/step-3")  # more likely a name than a folder of the root's


@pytest.mark.parametrize("uri", ["\0", "x" * 5000, "\ud800"])
def test_what_cannot_be_looked_for_is_not_gone(log, uri):
    log.saved(1, uri, look=True)
    log.saved(2, "b", look=True)
    assert log.take()[1] == ()
    assert not log.is_gone(uri)


def test_a_rank_that_reports_nothing_looks_for_nothing(log, tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    log.saved(1, str(path), look=False)
    path.rmdir()
    log.saved(2, "b", look=False)
    assert log.take()[1] == ()


def test_a_restore_leaves_behind_what_was_not_told_yet(log):
    log.saved(1, "a", look=True)
    log.saved(9, "b", look=True)
    log.restored(5)
    assert log.take() == (((1, "a"),), ("b",))


def test_what_is_kept_is_bounded(log):
    for step in range(1000):
        log.saved(step, str(step), look=False)
        log.deleted(str(-step))
    news = log.take()
    assert [len(each) for each in news] == [256, 256]
    assert news[0][-1] == (999, "999")
    assert len(log._seen) == 256
