"""The threats in docs/operating/security.md: each has what stops it, and a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operating/security.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in PAGE.partition("## Threats")[2].splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| who |"))
]


@cache
def names_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def test_there_are_threats_of_many_kinds():
    assert len(ROWS) >= 30
    assert len({who for who, *_ in ROWS if who}) >= 8
    assert len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_each_threat_is_stopped_and_has_a_test_that_exists(row):
    _, could, stops, test = row
    assert could
    assert stops
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
    assert named, f"{test!r} names no test"
    assert named[2] in names_of(named[1])
