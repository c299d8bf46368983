"""Known faults: each test states what is right and fails today; a fix removes its mark.

Here: the command line on its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What a user id without a passwd entry meets, as in a container: no $HOME, and nothing to look it up by.
WITHOUT_HOME = """
import pwd, runpy, sys

def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = no_entry
runpy.run_module("sharpwatch", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", ["jobs", "serve"])
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a user without a home directory gets a traceback",
)
def test_no_home_directory_is_one_line(tmp_path, command):
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    config = tmp_path / "sharpwatch.yaml"
    config.write_text(
        f'daemon: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", store: "sqlite:///{tmp_path}/j.db"}}\npolicies: []\n'
    )
    arguments = [command, "--config", str(config)] if command == "serve" else [command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOME, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"SHARPWATCH_ADDRESS": f"unix:{tmp_path}/none.sock"},
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
