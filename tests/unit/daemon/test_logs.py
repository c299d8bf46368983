"""What the daemon's log never shows, and how long a line gets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sharpwatch.daemon.logs import MAX_LINE, render_json, without_secrets

PROGRAM = """
import logging
import structlog
from sharpwatch.daemon.logs import configure_logs
configure_logs("info")
log = structlog.get_logger("test")
def fails(token):
    password = "hunter" + "2" * 3
    raise ValueError("no use of https://ann:pa55@hooks.example/x")
try:
    fails("s3cr" + "et-token")
except ValueError:
    log.exception("failed", header="Authorization: Bearer abc.DEF-123_x~y")
    logging.getLogger("aiohttp").exception("failed too")
log.warning("long", text="x" * 100_000, more=["y" * 5_000] * 3)
"""


def lines(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stderr.splitlines()


def test_no_line_has_a_local_variable_a_password_or_a_token():
    logged = lines(PROGRAM)
    text = "\n".join(logged)
    assert [json.loads(line)["event"] for line in logged] == ["failed", "failed too", "long"]
    assert not any(secret in text for secret in ("hunter222", "s3cret-token", "pa55", "ann:", "abc.DEF"))
    assert "ValueError: no use of https://***@hooks.example/x" in json.loads(logged[0])["exception"]
    assert json.loads(logged[0])["header"] == "Authorization: Bearer ***"
    assert all(len(line) <= MAX_LINE for line in logged)


@pytest.mark.parametrize(
    "event",
    [
        {"event": "e", "level": "info", "timestamp": "t", "reason": "é" * 10_000},
        {"event": "e" * 10_000, "level": "info", "timestamp": "t"},
        {"event": "e", "level": "info", "timestamp": "t", **{f"key{n}": "x" * 90 for n in range(1_000)}},
        {"event": "e", "level": "info", "timestamp": "t", "nested": {"a": [list(range(5_000))]}},
    ],
)
def test_a_line_is_bounded_and_still_json(event):
    line = render_json(None, "", event)
    assert len(line) <= MAX_LINE
    assert json.loads(line)["level"] == "info"


def test_of_a_long_traceback_the_end_is_kept():
    shown = json.loads(render_json(None, "", {"event": "e", "exception": "frame\n" * 5_000 + "ValueError: this"}))
    assert shown["exception"].endswith("ValueError: this")


def test_what_is_short_and_holds_no_secret_is_as_it_was():
    event = {"event": "serving", "grpc": "127.0.0.1:7741", "store": "sqlite:////var/x@y.db", "at": (1, 2)}
    assert without_secrets(None, "", dict(event)) == event
