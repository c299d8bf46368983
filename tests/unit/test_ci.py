"""The CI run brings along every program that a test asks for: there a missing one fails its test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_program_that_tests_run_has_its_package():
    asked = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r'\bprogram\("([\w+-]+)"\)', path.read_text(encoding="utf-8"))
    }
    packages = dict(re.findall(r"^ +\[([\w+-]+)\]=([\w+-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert {"g++", "promtool", "systemd-analyze"} <= asked <= packages.keys()
