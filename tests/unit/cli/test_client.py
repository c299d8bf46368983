"""Where the daemon is, which token is shown, and what a refusal means."""

from __future__ import annotations

import grpc
import pytest

from sharpwatch.cli.client import DaemonConnection, author, connected, find_connection, match_run, plain_words
from sharpwatch.cli.options import DaemonOptions
from sharpwatch.errors import OperatorError, TokenFileError

UNSHOWN = "no token was shown (/t is not there; --token-file or $SHARPWATCH_TOKEN_FILE names yours)"
RUNS = ["gpt2-a1", "gpt2-b7", "llama"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write_token(path, text="s3cret\n", mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.usefixtures("home")
def test_address_comes_from_the_option_then_the_environment_then_the_default():
    environ = {"SHARPWATCH_ADDRESS": "unix:/run/sw.sock"}
    assert find_connection(DaemonOptions(address="host:1"), environ).address == "host:1"
    assert find_connection(DaemonOptions(), environ).address == "unix:/run/sw.sock"
    assert find_connection(DaemonOptions(), {}).address == "127.0.0.1:7741"
    with pytest.raises(OperatorError, match=r"\$SHARPWATCH_ADDRESS: expected HOST:PORT or unix:PATH, .*, got 'x'"):
        find_connection(DaemonOptions(), {"SHARPWATCH_ADDRESS": "x"})


def test_token_comes_from_the_option_then_the_environment_then_the_default(home):
    assert find_connection(DaemonOptions(), {}).token == ""
    write_token(home / ".config/sharpwatch/operator.token", "default")
    named = write_token(home / "named")
    other = write_token(home / "other", "other")
    environ = {"SHARPWATCH_TOKEN_FILE": other}
    found = [
        find_connection(*given).token
        for given in (
            (DaemonOptions(), {}),
            (DaemonOptions(), environ),
            (DaemonOptions(token_file=named), environ),
        )
    ]
    assert found == ["default", "other", "s3cret"]
    with pytest.raises(TokenFileError, match="token file /nowhere/token: No such file"):
        find_connection(DaemonOptions(None, "/nowhere/token"), {})


def test_the_default_token_file_is_where_xdg_says(home, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    path = home / "xdg/sharpwatch/operator.token"
    path.parent.mkdir(parents=True)
    write_token(path, "of-xdg")
    assert find_connection(DaemonOptions(), {}).token_file == path
    assert find_connection(DaemonOptions(), {}).token


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_token_that_others_can_use_is_refused(home, mode):
    path = write_token(home / "token", mode=mode)
    with pytest.raises(TokenFileError, match=rf"has mode 0{mode:o}: others can read it; run: chmod 600 {path}"):
        find_connection(DaemonOptions(token_file=path), {})


@pytest.mark.parametrize("text", ["", "\n", "two words", "one\ntwo\n"])
def test_a_token_file_without_one_token_is_refused(home, text):
    with pytest.raises(TokenFileError, match="must hold one line with the token"):
        find_connection(DaemonOptions(token_file=write_token(home / "token", text)), {})


def test_a_token_never_crosses_the_network_in_the_clear(tmp_path):
    with (
        pytest.raises(
            OperatorError, match=r"to 10\.0\.0\.1:7741 unencrypted; use an SSH tunnel .*, or TLS: --tls-ca FILE"
        ),
        connected(DaemonConnection("10.0.0.1:7741", "s3cret", tmp_path / "token")),
    ):
        pytest.fail("connected")


def test_author(monkeypatch):
    assert author({"SHARPWATCH_AUTHOR": "oncall"}) == "oncall"
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "node3")
    assert author({}) == "ada@node3"


@pytest.mark.parametrize(("given", "name"), [("llama", "llama"), ("l", "llama"), ("gpt2-b", "gpt2-b7")])
def test_the_start_of_a_name_is_enough(given, name):
    assert match_run(given, RUNS) == name


def test_a_whole_name_wins_over_longer_ones():
    assert match_run("gpt2", ["gpt2", "gpt2-long"]) == "gpt2"


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        ("gpt2", RUNS, "run 'gpt2' may be any of gpt2-a1, gpt2-b7; write more of it"),
        ("bert", RUNS, "no run 'bert'; the daemon knows gpt2-a1, gpt2-b7, llama"),
        ("bert", [], "no run 'bert'; the daemon knows no run yet"),
        ("r", [f"r{n}" for n in range(10)], "run 'r' may be any of r0, r1, r2, r3, r4, r5, r6, r7 and 2 more"),
    ],
)
def test_candidates_are_listed(given, names, expected):
    with pytest.raises(OperatorError) as error:
        match_run(given, names)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7741",
            "daemon not reachable at h:1; is it running? start it with: sharpwatch serve",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:7741: Socket closed",
            "daemon at h:1 closes the connection; does it serve TLS? then name its authority: --tls-ca FILE",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            "draining",
            "daemon at h:1 can't do this now: draining",
        ),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "no",
            f"not allowed at h:1: no; {UNSHOWN}",
        ),
        (grpc.StatusCode.NOT_FOUND, "no run 'x'", "no run 'x'"),
        (grpc.StatusCode.INVALID_ARGUMENT, "one\n  two", "one two"),
        (grpc.StatusCode.INTERNAL, "boom", "daemon at h:1 failed with INTERNAL: boom; its log says more"),
        (grpc.StatusCode.NOT_FOUND, "", "daemon at h:1 failed with NOT_FOUND; its log says more"),
    ],
)
def test_a_status_in_plain_words(tmp_path, code, details, expected):
    assert plain_words(code, details, DaemonConnection("h:1", "", tmp_path.__class__("/t"))) == expected


def test_every_status_has_words_of_one_line(tmp_path):
    for code in grpc.StatusCode:
        assert "\n" not in plain_words(code, "a\nb", DaemonConnection("h:1", "token", tmp_path))
