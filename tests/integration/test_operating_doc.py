"""docs/operating.md: its tutorial goes as it says, and every command of it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from daemons import PATIENCE, Daemon
from forked import ForkedProcess

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    sharpwatch (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
SHIPPED = (ROOT / "examples/sharpwatch.yaml").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def daemon(tmp_path):
    """A daemon with the shipped policies."""
    running = Daemon(tmp_path, policies=SHIPPED[SHIPPED.index("policies:") :]).start()
    yield running
    running.stop()


@pytest.fixture
def trainer(daemon, tmp_path):
    """The tutorial's run."""
    environment = {"SHARPWATCH_ADDRESS": daemon.grpc, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "trainer.log").open("w") as log:
        process = ForkedProcess(
            path=ROOT / "examples/spike.py", cwd=tmp_path, env={**os.environ, **environment}, stderr=log
        )
        yield process
        process.kill()
        process.wait()
        process.close()


def awaited(daemon: Daemon, trainer: ForkedProcess, what: str, outcome: str) -> dict:
    """The first decision of that action once it has come to an outcome."""
    deadline = time.monotonic() + 4 * PATIENCE
    while time.monotonic() < deadline:
        assert trainer.poll() is None, (daemon.folder / "trainer.log").read_text()
        if any(run["run"] == "spike" for run in daemon.cli("jobs")["runs"]):
            for made in daemon.cli("decisions", "spike")["decisions"]:
                if (made["action"], made["outcome"]) == (what, outcome):
                    return made
        time.sleep(0.5)  # the trainer's progress can only be asked for
    raise AssertionError(f"no {what} is {outcome}: {daemon.cli('decisions', 'spike')}")


def test_the_tutorial_goes_as_it_says_and_every_command_is_run(daemon, trainer):
    proposed = awaited(daemon, trainer, "rollback", "proposed")
    assert proposed["rollback"]["checkpoint"]["step"] == 300
    assert "no learning rate makes weights whole again" in proposed["detail"]
    (incident,) = daemon.cli("incidents", "spike")["incidents"]
    assert (incident["name"], incident["cause"], incident["onset"]) == ("WeightJump", "damaged-weight", 301)
    assert incident["layer_blocks"][0] == "layers.1.ffn"
    ran = []

    def run(command: str, **names: str) -> subprocess.CompletedProcess:
        ran.append(command)
        words = [names.get(word, word) for word in shlex.split(command)]
        return daemon.command(*words)

    begin = COMMANDS.index("incidents spike")
    for command in COMMANDS[begin:]:
        done = run(command, ID=proposed["id"])
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    awaited(daemon, trainer, "rollback", "recovered")
    assert daemon.cli("incidents", "spike")["incidents"] == []

    for command in COMMANDS[:begin]:
        if command.startswith("serve"):
            ran.append(command)  # that is how the daemon of this test was started
            continue
        done = run(command, RUN="spike", ID=proposed["id"], TEXT="why")
        # What has been answered can't be once more.
        expected = 1 if command.startswith(("approve", "reject")) else 0
        assert done.returncode == expected, f"{command}: {done.stdout}{done.stderr}"
    assert sorted(ran) == sorted(COMMANDS)
