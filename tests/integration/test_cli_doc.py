"""docs/reference/cli.md names every command and every option of each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text(encoding="utf-8")
COMMON = {
    "--help",
    "--address",
    "--token-file",
    "--json",
    "--reason",
    "--no-wait",
    "--timeout",
    "--dry-run",
    "--version",
}
GROUPS = {
    "lr": ("show", "set", "history", "undo", "plan", "promote", "pause", "abort"),
    "silence": ("add", "list", "expire"),
}
COMMANDS = re.findall(r"^\| \[`([^]]+)`\]", DOCUMENT, re.MULTILINE)


def help_of(*command: str) -> str:
    command = (sys.executable, "-m", "sharpwatch", *command, "--help")
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_the_page_lists_every_command():
    listed = {name for row in COMMANDS for name in row.replace("`", "").split(", ")}
    known = set(re.findall(r"^ {2}([a-z][\w-]+) {2,}\S", help_of(), re.MULTILINE))
    assert known == listed


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("serve", "demo", "measure", "jobs", "show", "lr", "rollback", "mode", "decisions", "check-config", "doctor"),
        *("backup", "restore", "check-journal"),
        *("replay", "compare", "incidents", "ack", "reference", "silence", "report", "top"),
    ],
)
def test_a_section_has_the_options_of_its_command(command):
    section = DOCUMENT.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    commands = [(command, sub) for sub in GROUPS[command]] if command in GROUPS else [(command,)]
    found = {option for each in commands for option in options(help_of(*each))}
    documented = {option for row in re.findall(r"^\| `(.*?)`", section, re.MULTILINE) for option in options(row)}
    assert found - COMMON == documented - COMMON
    assert found <= documented | COMMON
