"""Every command in the pages on operating is run, each against a real daemon and a run in the state that it is for."""

from __future__ import annotations

import json
import re
import shlex
import threading
from itertools import count
from pathlib import Path

import pytest
from daemons import Daemon
from wire_trainer import WireTrainer

from sharpwatch.cli.main import main
from sharpwatch.v1 import types_pb2

ROOT = Path(__file__).parents[2]
COMMANDS = {
    command
    for page in (ROOT / "docs/operating").glob("*.md")
    for pattern in (r"^ {4}(sharpwatch .*?)(?: +#.*)?$", r"`(sharpwatch [^`\n]+)`")
    for command in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
}
# Named in the text without what they need; and how the daemon of these tests is started.
NOT_RUN = {
    *("sharpwatch ack", "sharpwatch check-journal", "sharpwatch lr show", "sharpwatch lr undo", "sharpwatch measure"),
    *("sharpwatch show", "sharpwatch token", "sharpwatch serve --config sharpwatch.yaml"),
}
LOCAL = {"backup", "check-config", "compare", "restore", "token"}  # need no daemon
# What stands for something of the reader's.
GIVEN = {
    "TEXT": "why",
    "STEP": "20",
    "A:B": "24:28",
    "1200": "20",
    "1204:1210": "24:28",
    "BLOCK=0.5": "qk=0.5",
    "BLOCK=0.1": "qk=0.1",
    "FILE": str(ROOT / "examples/sharpwatch.yaml"),
}
PROPOSES = "policies: [{name: cut, match: {alert: NonFinite}, mode: advise, action: {kind: scale_lr, factor: 0.5}}]"
_numbers = count()


class Trainer(WireTrainer):
    """Takes steps until it is ended, and goes back when it is told to."""

    def __init__(self, address: str, run: str) -> None:
        may = {"control": "rollback", "can_roll_back": True, "takes_update_intervals": True}
        super().__init__(address, run=run, attempt=f"{run}-1", **may)
        self.run = run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def begin(self) -> None:
        """Go on by itself."""
        self._thread.start()

    def leave(self) -> None:
        """End the training, and say farewell."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self.step(closing=True)
        self.stop()

    def _train(self) -> None:
        while not self._ended.is_set():
            back = next((each.rollback.checkpoint for each in self.commands if each.HasField("rollback")), None)
            if back is not None:
                self.step_taken = back.step
            self.step(restored=back is not None)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One for all commands: each has a run of its own."""
    running = Daemon(tmp_path_factory.mktemp("operating"), policies=PROPOSES).start()
    yield running
    running.stop()


@pytest.fixture
def sharpwatch(daemon, capsys, tmp_path, monkeypatch):
    """Run a command line in this process, in an empty folder; its standard output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(*words: str) -> str:
        target = [] if words[0] in LOCAL else ["--address", daemon.grpc, "--token-file", str(daemon.token_file)]
        status = main([*target, *words])
        out, err = capsys.readouterr()
        assert status == 0, f"{words}: {out}{err}"
        return out

    return run


@pytest.fixture
def begin(daemon):
    """Begin a run that has checkpoints, and where it is `faulty` an incident, for which a cut is proposed."""
    trainers = []

    def start(*, faulty: bool) -> Trainer:
        name = f"run-{next(_numbers)}"
        trainer = Trainer(daemon.grpc, name)
        trainers.append(trainer)
        for step in range(1, 31):
            saved = [types_pb2.Checkpoint(step=step, uri=f"file:///{name}/{step}")] if step in {10, 20} else []
            trainer.step(checkpoints=saved)
        trainer.step(non_finite={"qk": int(faulty)})
        trainer.step()  # acknowledged after that one was judged
        trainer.begin()
        return trainer

    yield start
    for trainer in trainers:
        trainer.leave()


def prepared(words: list[str], sharpwatch, trainer: Trainer) -> str:
    """Bring things to where the command makes sense; the id that it needs."""
    run = trainer.run
    match words:
        case ["lr", "undo", *_]:
            sharpwatch("lr", "set", run, "qk=0.5", "--reason", "r")
        case ["lr", "promote" | "pause" | "abort", *_]:
            sharpwatch("lr", "plan", run, "paper", "--reason", "r")
            if words[1] == "promote":
                sharpwatch("lr", "pause", run)  # only a plan that waits can be promoted
        case ["silence", "expire", *_]:
            made = sharpwatch("--json", "silence", "add", run, "--for", "1h", "--comment", "c")
            return json.loads(made)["id"]
        case ["forget", *_]:
            trainer.leave()
        case ["token", "revoke", name]:
            sharpwatch("token", "create", "--role", "viewer", "--name", name)
        case ["ack", *_]:
            return json.loads(sharpwatch("--json", "incidents", run))["incidents"][0]["id"]
        case ["approve" | "reject" | "cancel", *_]:
            (made,) = json.loads(sharpwatch("--json", "decisions", run))["decisions"]
            assert made["outcome"] == "proposed"
            return made["id"]
    return ""


@pytest.mark.parametrize("command", sorted(COMMANDS - NOT_RUN))
def test_a_command_does_what_the_page_shows_it_for(command, sharpwatch, begin, daemon, tmp_path):
    words = shlex.split(command.partition(" > ")[0])[1:]
    # No plan begins while an incident is open.
    trainer = begin(faulty=words[:2] not in [["lr", each] for each in ("plan", "promote", "pause", "abort")])
    needed = prepared(words, sharpwatch, trainer)
    names = GIVEN | {"RUN": trainer.run, "ID": needed, "3f9c01d2ab47": needed, "gpt2-a1": trainer.run}
    names |= {"12000": str(trainer.step_taken + 500), "STORE": f"sqlite:///{daemon.folder}/sharpwatch.db"}
    backup, config = str(tmp_path / "backup.db"), daemon.folder / "sharpwatch.yaml"
    names |= {"/backups/sharpwatch-$(date +%F).db": backup, "/backups/sharpwatch-2026-11-30.db": backup}
    if words[0] == "restore":
        sharpwatch("backup", "--config", str(config), "--to", backup)
        config = tmp_path / "sharpwatch.yaml"
        config.write_text(f"daemon: {{store: 'sqlite:///{tmp_path}/sharpwatch.db'}}\n")
    names["/etc/sharpwatch/sharpwatch.yaml"] = str(config)
    if "REFERENCE" in words:
        names["REFERENCE"] = begin(faulty=False).run
    sharpwatch(*(names.get(word, word) for word in words))
