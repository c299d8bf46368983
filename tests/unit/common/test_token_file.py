from __future__ import annotations

import stat

import pytest

from sharpwatch.common.token_file import make_token, read_token
from sharpwatch.errors import TokenFileError


def test_a_new_token_is_its_owners_alone_and_each_time_another(tmp_path):
    first, second = tmp_path / "a/operator.token", tmp_path / "b/operator.token"
    make_token(first)
    make_token(second)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert len(read_token(first)) >= 32
    assert read_token(first) != read_token(second)


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "operator.token"
    make_token(path)
    token = read_token(path)
    with pytest.raises(TokenFileError, match="File exists"):
        make_token(path)
    assert read_token(path) == token


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "operator.token"
    path.touch(mode=0o600)
    path.write_bytes(b"\xff\n")
    with pytest.raises(TokenFileError, match="is not ASCII text"):
        read_token(path)
