"""How many files an operation runs through: a ratchet. Raise a figure only with the reason in docs/log.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crossings.py"
LIMITS = {
    "attach": (49, 199),
    "step": (23, 135),
    "step with a gnb probe": (49, 310),
    "sample with a gnb probe, at the daemon": (28, 140),
}


@pytest.fixture(scope="module")
def measured():
    spec = importlib.util.spec_from_file_location("crossings", SCRIPT)
    crossings = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crossings)
    return crossings.measured()


def test_every_operation_is_measured(measured):
    assert measured.keys() == LIMITS.keys()
    assert all(figures["calls"] > 20 for figures in measured.values())


@pytest.mark.parametrize("operation", LIMITS)
def test_an_operation_runs_through_no_more_files_than_it_did(measured, operation):
    files, changes = LIMITS[operation]
    assert measured[operation]["files"] <= files, measured[operation]["order"]
    assert measured[operation]["changes"] <= changes
