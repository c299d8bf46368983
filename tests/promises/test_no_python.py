"""Promise: where `sys.executable` is no Python, the training does not run once more in a courier's place."""

from __future__ import annotations

import sys

import pytest
import torch
from daemons import await_end

import sharpwatch
from sharpwatch.agent.transport.courier_launcher import ENVIRONMENT
from sharpwatch.errors import AttachError

STEPS = 10
KNOWN = f"""
for lie in "sys.frozen = True", "sys.executable = ''", "sys.executable = None":
    frozen, executable = getattr(sys, "frozen", False), sys.executable
    exec(lie)
    trainer = Trainer()
    trainer.train({STEPS})
    say(courier=trainer.transport.courier_pid)
    trainer.close()
    sys.frozen, sys.executable = frozen, executable
"""
# The program stands in a file of its own, and `sys.executable` for a binary that runs it whatever its arguments are.
UNKNOWN = """
import os, select, sys
def note(word):
    with open("notes", "a") as notes:
        notes.write(f"{word} {os.getpid()}\\n")
note("started")
sys.executable = os.path.abspath("program")
from trainer import *
trainer = Trainer()
note("attached")
while not trainer.transport._restart._given_up:
    trainer.step()
    select.select([], [], [], 0.05)  # a courier more is tried after some time, not after so many steps
trainer.train(10)
trainer.close()
"""


def test_a_program_that_says_it_has_no_python(train, assert_unchanged, tmp_path):
    with (tmp_path / "stderr").open("w+") as stderr:
        trainer = train(KNOWN, stderr=stderr)
        assert trainer.end() == 0
        stderr.seek(0)
        said = stderr.read()
    assert_unchanged(trainer)
    assert trainer.all_values("courier") == [None] * 3
    assert trainer.all_values("swallowed") == [0] * 3
    assert trainer.all_values("dropped") == [{"undelivered": STEPS + 1}] * 3
    assert said.count("no courier in this program") == 3  # once a run


def test_a_program_that_is_its_own_executable(train, assert_unchanged, tmp_path):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" program.py "$@"\n')
    program.chmod(0o755)
    (tmp_path / "program.py").write_text(UNKNOWN)
    trainer = train("exec(open('program.py').read())", folder=tmp_path)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [word for word, _ in notes].count("started") == 2
    assert [process for word, process in notes if word == "attached"] == [str(trainer.process.pid)]
    for _, process in notes:
        await_end(int(process))
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {"undelivered": len(trainer.steps) + 1}


def test_attach_in_a_couriers_place(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "{}")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(AttachError, match="as the courier of another one"):
        sharpwatch.attach(model, torch.optim.SGD(model.parameters()), training_job="promise")
