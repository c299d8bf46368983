"""The runbooks: a section for every alert and every outcome, each with three answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from sharpwatch.daemon.decisions.transitions import OUTCOMES
from sharpwatch.daemon.records import DetectedAlert

DOCS = Path(__file__).parents[2] / "docs/operating"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("runbooks", "outcomes", "alerts")}
SECTIONS = {
    (page, title): text
    for page in ("runbooks", "outcomes")
    for title, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
}


def test_every_alert_and_every_outcome_has_a_section():
    assert sorted(title for page, title in SECTIONS if page == "runbooks") == sorted(get_args(DetectedAlert))
    assert [title for page, title in SECTIONS if page == "outcomes"] == [each for each in OUTCOMES if each != "draft"]
    assert all(f"`{name}`" in PAGES["alerts"] for name in get_args(DetectedAlert))


@pytest.mark.parametrize(("page", "title"), SECTIONS)
def test_a_section_says_what_it_means_what_to_look_at_and_what_to_do(page, title):
    answers = re.findall(r"^\*\*(.+?)\.\*\*", SECTIONS[page, title], re.MULTILINE)
    assert answers == ["What it means", "What to look at", "What to do"]


@pytest.mark.parametrize("title", [title for page, title in SECTIONS if page == "outcomes"])
def test_a_section_of_an_outcome_has_a_command(title):
    assert "sharpwatch " in SECTIONS["outcomes", title]
