"""docs/reference/environment.md names every environment variable that the package reads, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")


def test_the_page_names_every_variable_of_the_package():
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "sharpwatch").rglob("*.py"))
    read = {name for text in sources for name in re.findall(r"\bSHARPWATCH_[A-Z][A-Z_]*[A-Z]\b", text)}
    assert set(re.findall(r"^\| `(SHARPWATCH_\w+)` \|", DOCUMENT, re.MULTILINE)) == read
