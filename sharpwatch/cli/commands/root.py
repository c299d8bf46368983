"""The group `sharpwatch` and the table of its commands."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from sharpwatch._version import __version__
from sharpwatch.cli.options import LazyCommand, LazyGroup

PROGRAM = "sharpwatch"
_COMPLETION = "_SHARPWATCH_COMPLETE"

_START, _LOOK, _ACT, _CHECK = "Get started", "Look at runs", "Act on a run", "Run and check a daemon"
_HERE = "sharpwatch.cli.commands"
_COMMANDS = {
    "demo": LazyCommand(_START, "Watch a small model train, break and recover.", f"{_HERE}.serve:demo"),
    "measure": LazyCommand(_START, "Measure the sharpness of a checkpoint.", "sharpwatch.cli.measure.command:measure"),
    "replay": LazyCommand(_START, "Find incidents in the log of a training.", f"{_HERE}.replay:replay"),
    "compare": LazyCommand(_START, "Show how two runs differ, and where they part.", f"{_HERE}.compare:compare"),
    "jobs": LazyCommand(_LOOK, "List the runs that the daemon knows.", f"{_HERE}.runs:jobs"),
    "top": LazyCommand(_LOOK, "Show all runs, kept up to date, the worst first.", f"{_HERE}.top:top"),
    "show": LazyCommand(_LOOK, "Show one run: blocks, open incidents, failures.", f"{_HERE}.runs:show"),
    "incidents": LazyCommand(_LOOK, "List the incidents of a run.", f"{_HERE}.incidents:incidents"),
    "decisions": LazyCommand(_LOOK, "List decisions and their outcomes.", f"{_HERE}.decisions:decisions"),
    "report": LazyCommand(
        _LOOK, "Write what happened in a run as an HTML file.", "sharpwatch.cli.report.command:report"
    ),
    "lr": LazyCommand(_ACT, "Show, set and undo learning-rate multipliers.", f"{_HERE}.lr:lr"),
    "mode": LazyCommand(_ACT, "Print or set the mode of a run, or of all.", f"{_HERE}.mode:mode"),
    "silence": LazyCommand(_ACT, "Keep policies from acting for some time.", f"{_HERE}.silence:silence"),
    "reference": LazyCommand(_ACT, "Print or set what a run is held against.", f"{_HERE}.reference:reference"),
    "rollback": LazyCommand(_ACT, "Ask a trainer to go back to a checkpoint.", f"{_HERE}.decisions:rollback"),
    "release": LazyCommand(_ACT, "Give a run's name to another trainer.", f"{_HERE}.release:release"),
    "ack": LazyCommand(_ACT, "Note that you have seen an incident.", f"{_HERE}.incidents:ack"),
    "approve": LazyCommand(_ACT, "Approve a proposed decision.", f"{_HERE}.decisions:approve"),
    "reject": LazyCommand(_ACT, "Reject a proposed decision.", f"{_HERE}.decisions:reject"),
    "cancel": LazyCommand(_ACT, "Take back a decision that is not applied yet.", f"{_HERE}.decisions:cancel"),
    "forget": LazyCommand(_ACT, "Delete all that is kept of an ended run.", f"{_HERE}.forget:forget"),
    "serve": LazyCommand(_CHECK, "Run the daemon.", f"{_HERE}.serve:serve"),
    "token": LazyCommand(_CHECK, "Make, list and revoke tokens of a daemon.", f"{_HERE}.token:token"),
    "check-config": LazyCommand(_CHECK, "Check a daemon's configuration file.", f"{_HERE}.serve:check_config"),
    "backup": LazyCommand(_CHECK, "Copy the daemon's journal, while it goes on.", f"{_HERE}.backup:backup"),
    "restore": LazyCommand(_CHECK, "Put a backup in the place of the journal.", f"{_HERE}.restore:restore"),
    "check-journal": LazyCommand(_CHECK, "Check the daemon's journal.", f"{_HERE}.check_journal:check_journal"),
    "doctor": LazyCommand(_CHECK, "Check this installation and its daemon.", f"{_HERE}.doctor:doctor"),
}

root = LazyGroup(
    PROGRAM,
    lazy=_COMMANDS,
    help="Watch the sharpness of a transformer's blocks while it trains, alert on it, and act on it.",
    epilog="`sharpwatch COMMAND --help` explains a command.",
    example="sharpwatch serve\nsharpwatch jobs",
)
click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")(root)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, or complete one for a shell.

    Args:
        arguments: What follows `sharpwatch` on the command line.

    Returns:
        The exit status.
    """
    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete  # noqa: PLC0415 - only for completion

        return shell_complete(root, {}, PROGRAM, _COMPLETION, instruction)
    try:
        # Not root.main(): it would turn Ctrl-C and a closed pipe into messages of its own.
        with root.make_context(PROGRAM, list(arguments)) as context:
            return int(root.invoke(context) or 0)
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except click.UsageError as error:
        _print_usage_error(error)
        return error.exit_code


def _print_usage_error(error: click.UsageError) -> None:
    command = error.ctx.command_path if error.ctx else PROGRAM
    message = " ".join(error.format_message().split()).rstrip(".")
    click.echo(f"{command}: {message}; see {command} --help", err=True)
