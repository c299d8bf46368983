"""A user without a home directory, as a container's uid without $HOME: what needs one says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # a process each, the daemon with torch

# No passwd entry to look the home directory up by. A real uid of this kind could not read this environment.
WITHOUT_HOME = """
import pwd, runpy, sys

def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = no_entry
runpy.run_module("sharpwatch", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def command(tmp_path):
    """Run a command line as that user."""

    def run(*arguments, more=()):
        environment = {name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_CONFIG_HOME"}}
        environment |= {"SHARPWATCH_ADDRESS": f"unix:{tmp_path}/none.sock"} | dict(more)
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_HOME, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=tmp_path,
            timeout=60,
        )

    return run


def one_line(done, message):
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert message in line


def config(tmp_path, *lines):
    path = tmp_path / "sharpwatch.yaml"
    daemon = ('grpc: "127.0.0.1:0"', 'http: "127.0.0.1:0"', *lines)
    path.write_text(f"daemon: {{{', '.join(daemon)}}}\npolicies: []\n")
    return path


@pytest.mark.parametrize("arguments", [("jobs",), ("show", "run"), ("rollback", "run", "--reason", "x")], ids=str)
def test_reading_and_asking_need_no_home(command, arguments):
    one_line(command(*arguments), "none.sock")  # no daemon listens there


def test_a_daemon_says_what_to_name(command, tmp_path):
    done = command("serve", "--config", config(tmp_path, f'store: "sqlite:///{tmp_path}/j.db"'))
    one_line(done, "operator.token: this user has no home directory; set $HOME, or name another file")
    assert not (tmp_path / "~").exists()


def test_a_journal_in_the_home_directory(command, tmp_path):
    done = command("serve", "--config", config(tmp_path, 'store: "sqlite:///~/j.db"', f"token_file: {tmp_path}/token"))
    one_line(done, "store sqlite:///~/j.db: this user has no home directory; set $HOME, or name another path")


def test_a_named_token_file_in_the_home_directory(command):
    one_line(command("jobs", "--token-file", "~/token"), "token file ~/token: this user has no home directory")
    done = command("jobs", more={"SHARPWATCH_TOKEN_FILE": "~/token"})
    one_line(done, "token file ~/token: this user has no home directory")


def test_a_configuration_is_checked_without_a_home(command, tmp_path):
    done = command("check-config", config(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
