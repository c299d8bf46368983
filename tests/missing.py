"""What a test needs and does not find: CI brings all of it along, a user's machine need not."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """The test fails in CI and is skipped elsewhere."""
    message = f"{what} is not installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
