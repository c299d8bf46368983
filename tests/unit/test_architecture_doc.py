"""docs/architecture.md has every module in the table of its folder, once, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)/`(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))
FOLDERS = {path.parent.name for path in (ROOT / "sharpwatch").glob("*/__init__.py")} - {"v1"}  # v1 is generated


def test_every_folder_has_a_section():
    assert set(SECTIONS) == FOLDERS


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_tables_name_every_module_once_and_no_other(folder):
    cells = re.findall(r"^\| (`.*?) \|", SECTIONS[folder], re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+\.py)`", cell)]
    assert sorted(named) == sorted(p.name for p in (ROOT / "sharpwatch" / folder).glob("*.py") if p.stem != "__init__")
