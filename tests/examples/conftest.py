"""A real daemon for the examples."""

from __future__ import annotations

import pytest
from daemons import Daemon


@pytest.fixture
def daemon(tmp_path):
    """A running daemon without policies."""
    running = Daemon(tmp_path).start()
    yield running
    if running.process.returncode is None:
        running.stop()
