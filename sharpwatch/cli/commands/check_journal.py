"""`sharpwatch check-journal`: whether the journal is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from sharpwatch.cli.commands.journal_options import journal_options
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import LocalCommand


@click.command("check-journal", cls=LocalCommand, example="sharpwatch check-journal --config sharpwatch.yaml")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@journal_options
def check_journal(journal: Path, *, as_json: bool) -> int:
    """Check all of the daemon's journal, or of a backup: the database itself, and that no record lacks another.

    It takes about as long as reading the file. The daemon may be running; for a large journal, check a backup. The exit
    status is 1 if something is wrong.
    """
    with needs_extra("check-journal", "daemon"):
        from sharpwatch.daemon.storage import check  # noqa: PLC0415 - loads numpy
    report = check.check_journal(journal)
    if as_json:
        print(json.dumps({"journal": str(journal), **asdict(report)}, indent=2))
    else:
        counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
        print(f"{journal}: {'damaged' if report.problems else 'whole'}; {counts}")
        for line in (*report.problems, *(f"note: {each}" for each in report.notes)):
            print(line)
    return 1 if report.problems else 0
