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


def test_every_path_it_names_exists():
    paths = re.findall(r"`((?:sharpwatch|tests|protos|docs)/[\w./]+)`", DOCUMENT)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_module_that_a_row_names_stands_in_its_package():
    for package, text in re.findall(
        r"^\| `(sharpwatch\.(?:common|curvature[\w.]*|checkpointing))` \| (.*) \|$", TABLE, re.MULTILINE
    ):
        folder = ROOT / package.replace(".", "/")
        named = re.findall(r"\(((?:`\w+`(?:, )?)+)\)", text)
        modules = [module for names in named for module in re.findall(r"\w+", names)]
        assert not [module for module in modules if not (folder / f"{module}.py").exists()], package
