"""The tables that stand in pages of the documentation, each between two comments."""

from __future__ import annotations

from pathlib import Path


def write_table(page: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- name: begin -->` and `<!-- name: end -->` of `page`."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
