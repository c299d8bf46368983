"""A file's content as it is on disk now."""

from __future__ import annotations

import os

import pytest

from sharpwatch.common.token_file import read_token
from sharpwatch.common.watched_file import WatchedFile
from sharpwatch.errors import SharpwatchError


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("first\n")
    return path


def test_it_is_read_only_when_it_has_changed(token):
    reads, told = [], []
    watched = WatchedFile(token, lambda path: reads.append(path) or read_token(path), told.append)
    assert [watched.current() for _ in range(3)] == ["first"] * 3
    assert (len(reads), told) == (1, [])
    token.write_text("second\n")
    assert [watched.current() for _ in range(3)] == ["second"] * 3
    assert (len(reads), told) == (2, [None])


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(token):
    watched = WatchedFile(token, read_token)
    assert watched.current() == "first"
    before = token.stat()
    other = token.with_name("other")
    other.touch(mode=0o600)
    other.write_text("other\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(token)
    assert watched.current() == "other"


def test_a_mode_and_an_absence_are_noticed_and_told_once(token):
    told = []
    watched = WatchedFile(token, read_token, told.append)
    watched.current()
    for spoil, mend, reason in (
        (lambda: token.chmod(0o644), lambda: token.chmod(0o600), "others can read it"),
        (lambda: token.rename(token.with_name("away")), lambda: token.with_name("away").rename(token), "No such file"),
    ):
        told.clear()
        spoil()
        for _ in range(3):
            with pytest.raises(SharpwatchError, match=reason):
                watched.current()
        mend()
        assert watched.current() == "first"
        assert len(told) == 2
        assert reason in str(told[0])
        assert told[1] is None


def test_what_is_wrong_from_the_start_is_told(tmp_path):
    told = []
    watched = WatchedFile(tmp_path / "none", read_token, told.append)
    with pytest.raises(SharpwatchError, match="No such file"):
        watched.current()
    assert len(told) == 1
