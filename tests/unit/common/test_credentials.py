"""The file of credentials: what is written, what is refused, and that no refusal shows a token."""

from __future__ import annotations

import stat
from datetime import UTC, datetime

import pytest

from sharpwatch.common.credentials import hash_token, make_credential, read_credentials, write_credentials
from sharpwatch.errors import ConfigError, TokenFileError

HASH = "0" * 64


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new/credentials.yaml"
    until = datetime(2027, 1, 31, 12, tzinfo=UTC)
    token, agent = make_credential("gpt2", "agent", ["gpt2-owt", "on: off"], until)
    _, viewer = make_credential("ann@node3", "viewer")
    write_credentials(path, [agent, viewer])
    assert read_credentials(path) == (agent, viewer)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token not in path.read_text()
    assert agent.sha256 == hash_token(token.encode())
    assert len(token) >= 43  # 256 bits


def test_no_two_tokens_are_equal():
    assert len({make_credential("gpt2", "agent")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "credentials:\n- {name: a, role: boss, sha256: HASH}",
            r":2: credentials\[0\]\.role: expected agent, viewer, op",
        ),
        ("credentials:\n- {name: a, role: agent, sha256: s3cret-token}", r"\.sha256: expected 64 digits of 0-9 a-f"),
        ("credentials:\n- {name: a b, role: agent, sha256: HASH}", r"\.name: expected A-Z a-z 0-9"),
        ("credentials:\n- {name: a, role: agent}", r"\.sha256: expected 64 digits"),
        ("credentials:\n- {name: a, role: agent, sha256: HASH, job: [x]}", r"unknown key; .*; did you mean 'jobs'\?"),
        ("credentials:\n- {name: a, role: viewer, sha256: HASH, jobs: [x]}", r"\.jobs: is for role agent"),
        ("credentials:\n- {name: a, role: agent, sha256: HASH, jobs: []}", r"\.jobs: .* at least one training job"),
        ("credentials:\n- {name: a, role: agent, sha256: HASH, jobs: x}", r"\.jobs: expected a list"),
        ("credentials:\n- {name: a, role: agent, sha256: HASH, expires: soon}", r"\.expires: expected a time such as"),
        (
            "credentials:\n- {name: a, role: agent, sha256: HASH}\n- {name: a, role: viewer, sha256: HASH}",
            "is taken by",
        ),
        ("tokens: []", "expected one key, credentials"),
        ("credentials: [3]", "expected a mapping with keys name, role, sha256, jobs, expires"),
    ],
)
def test_a_wrong_entry_is_named_and_its_value_is_not(tmp_path, text, expected):
    path = tmp_path / "credentials.yaml"
    path.touch(mode=0o600)
    # YAML takes sixty-four zeros for a number.
    path.write_text(text.replace("HASH", f'"{HASH}"'))
    with pytest.raises(ConfigError, match=expected) as caught:
        read_credentials(path)
    assert "s3cret" not in str(caught.value)


def test_a_file_that_others_can_change_is_refused(tmp_path):
    path = tmp_path / "credentials.yaml"
    write_credentials(path, [])
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(TokenFileError, match=f"has mode 0{mode:o}: others can change it; run: chmod go-w"):
            read_credentials(path)
    path.chmod(0o644)  # hashes are no secret
    assert read_credentials(path) == ()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_credentials(tmp_path / "none")
