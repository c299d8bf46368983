"""Setups that people really train: attached without a rule, bit-identical, with right numbers or a reason for none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from missing import missing

sys.path.append(str(Path(__file__).parents[2]))  # pytest started by its own name does not look there
from benchmarks.setups.registry import SETUPS
from benchmarks.setups.run import verdicts


@pytest.mark.filterwarnings("ignore")  # those that trainers raise are not ours
@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_is_watched_without_a_wrong_number(name, monkeypatch):
    setup = SETUPS[name]
    for package in setup.missing:
        if package in setup.needs:
            missing(package)
        pytest.skip(f"{package} is not installed, and `pip install -e .[dev]` does not bring it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for verdict in verdicts(setup):
        assert list(verdict.problems()) == []
