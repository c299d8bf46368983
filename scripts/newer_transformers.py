"""Tells what another transformers changes in docs/families.md: `python scripts/newer_transformers.py [VERSION]`.

It installs that transformers (by default the newest release) and its requirements into a temporary folder, runs
docs/families.py with it, and prints each model class that is not classified as in docs/families.md. The exit status is
1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "families.md"


@dataclass(frozen=True)
class Difference:
    """One model class that is not classified as before, and its two rows; a row is empty where the class is absent."""

    kind: str  # "added", "gone", "changed" or "failing"
    model: str
    before: str
    now: str


def compare(before: str, now: str) -> list[Difference]:
    """Compare two tables of docs/families.py, class by class.

    Args:
        before: The text of the table that is known to be right.
        now: The text of the table to check.

    Returns:
        The differences, sorted by model class.
    """
    old, new = _rows(before), _rows(now)
    models = sorted(model for model in old.keys() | new.keys() if old.get(model) != new.get(model))
    return [_difference(model, old.get(model, ""), new.get(model, "")) for model in models]


def _rows(table: str) -> dict[str, str]:
    """The rest of each row by "family class"."""
    rows = (line.split(" | ", 2) for line in table.splitlines() if line.startswith("| "))
    return {f"{family.removeprefix('| ')} {model}": rest for family, model, rest in rows}


def _difference(model: str, before: str, now: str) -> Difference:
    if not now:
        return Difference("gone", model, before, now)
    if "not built:" in now or "not classified:" in now:
        return Difference("failing", model, before, now)
    return Difference("changed" if before else "added", model, before, now)


def report(differences: list[Difference]) -> str:
    """Write each difference with its rows, then how many there are of each kind."""
    lines = []
    for difference in differences:
        lines.append(f"{difference.kind}: {difference.model}")
        lines += [f"  {sign} {row}" for sign, row in (("-", difference.before), ("+", difference.now)) if row]
    counts = Counter(difference.kind for difference in differences)
    lines.append(", ".join(f"{counts[kind]} {kind}" for kind in ("added", "gone", "changed", "failing")))
    return "\n".join(lines)


def _table_with(requirement: str, scratch: Path) -> str:
    """The table that docs/families.py writes with this requirement installed in `scratch`."""
    packages, table = scratch / "packages", scratch / "families.md"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), requirement]
    subprocess.run(pip, check=True)
    families = [sys.executable, str(ROOT / "docs" / "families.py"), str(table)]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    run = subprocess.run(families, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"docs/families.py failed with {requirement}:\n{run.stderr}")
    return table.read_text(encoding="utf-8")


def _version(table: str) -> str:
    return table.partition("with transformers ")[2].partition(". ")[0]


def main() -> None:
    """Print the differences between docs/families.md and the other version's table."""
    parser = argparse.ArgumentParser(description="what another transformers changes in docs/families.md")
    parser.add_argument("version", nargs="?", help="the version to try (default: the newest release)")
    version = parser.parse_args().version
    before = TABLE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        now = _table_with(f"transformers=={version}" if version else "transformers", Path(scratch))
    differences = compare(before, now)
    print(f"transformers {_version(before)} (docs/families.md) -> {_version(now)}")
    print(report(differences))
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
