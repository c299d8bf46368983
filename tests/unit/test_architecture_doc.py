"""docs/architecture.md has one line for each package of sharpwatch, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.partition("## Packages")[2].partition("\n## ")[0]


def test_the_table_has_one_line_for_each_package():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "sharpwatch").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders} - {"sharpwatch.v1"}  # v1 is generated
    named = re.findall(r"^\| `(sharpwatch[\w.]*)` \|", TABLE, re.MULTILINE)
    assert sorted(named) == sorted(packages)
