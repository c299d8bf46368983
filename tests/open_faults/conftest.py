"""What the tests of known faults share: a watch whose messages are kept, and a real daemon with trainers by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from daemons import Daemon

sys.path.insert(0, str(Path(__file__).parent))  # for the module below
from recorded_watch import RecordedWatch


@pytest.fixture
def recorded(serve):
    """Attach to a daemon that takes every sample; afterwards, everything it received."""
    return RecordedWatch(serve())


@pytest.fixture
def make_daemon(tmp_path):
    """Start real daemons in processes of their own, with given policies."""
    made = []

    def make(policies: str = "policies: []") -> Daemon:
        folder = tmp_path / f"daemon{len(made)}"
        folder.mkdir()
        made.append(Daemon(folder, policies).start())
        return made[-1]

    yield make
    for running in made:
        running.stop()


@pytest.fixture
def daemon(make_daemon):
    """A running daemon without policies."""
    return make_daemon()
