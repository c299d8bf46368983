"""`sharpwatch backup`: a copy of the journal, while the daemon goes on."""

from __future__ import annotations

import time
from pathlib import Path

import click

from sharpwatch.cli.commands.journal_options import journal_options
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import LocalCommand


@click.command(
    cls=LocalCommand,
    example="sharpwatch backup --config sharpwatch.yaml --to /backups/sharpwatch.db",
)
@click.option(
    "--to",
    "target",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The backup, which must not exist. Default: the journal's name with the time, in the current directory.",
)
@journal_options
def backup(journal: Path, target: Path | None) -> None:
    """Copy the daemon's journal into one file, as it is at this moment. The daemon may be running, and goes on.

    Run it as the daemon's user, on its machine. The copy is checked before it gets its name.
    """
    with needs_extra("backup", "daemon"):
        from sharpwatch.daemon.storage.backup import back_up  # noqa: PLC0415 - loads numpy
    made = target or Path(f"{journal.stem}-{time.strftime('%Y%m%dT%H%M%S')}{journal.suffix}")
    written = back_up(journal, made)
    print(f"{made}: {written / 1e6:.1f} MB")
