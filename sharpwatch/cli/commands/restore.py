"""`sharpwatch restore`: a backup in the place of the journal."""

from __future__ import annotations

from pathlib import Path

import click

from sharpwatch.cli.commands.journal_options import journal_options
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import LocalCommand


@click.command(
    cls=LocalCommand,
    example="sharpwatch restore /backups/sharpwatch.db --config sharpwatch.yaml",
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path), help="The backup.")
@click.option("--force", is_flag=True, help="Move a journal that is there aside, under another name.")
@journal_options
def restore(file: Path, journal: Path, *, force: bool) -> None:
    """Put a backup in the place of the daemon's journal. The daemon must not be running.

    The backup is checked first. What the daemon took in after the backup is missing then; agents go on, and send what
    they still hold.
    """
    with needs_extra("restore", "daemon"):
        from sharpwatch.daemon.storage import backup  # noqa: PLC0415 - loads numpy
    for moved in backup.restore(file, journal, force=force):
        print(f"moved aside: {moved}")
    print(f"restored: {journal}")
