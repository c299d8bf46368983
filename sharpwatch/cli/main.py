"""`sharpwatch`: finds the command, loads only what it needs, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharpwatch._version import __version__
from sharpwatch.cli.arguments import Command, Parser, add_global
from sharpwatch.errors import SharpwatchError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a command lives: loaded on use, so that a client command never waits for torch."""

    module: str
    help: str
    asks_daemon: bool = True  # takes the global options
    group: bool = False  # has commands of its own
    extra: str = "daemon"  # what to install where a package is missing


_COMMANDS = {
    "serve": _Entry("sharpwatch.cli.commands.serve", "run the daemon", asks_daemon=False),
    "demo": _Entry(
        "sharpwatch.cli.commands.demo", "watch a small model train, break and recover", asks_daemon=False, extra="demo"
    ),
    "measure": _Entry(
        "sharpwatch.cli.measure.command", "measure the sharpness of a checkpoint", asks_daemon=False, extra="measure"
    ),
    "jobs": _Entry("sharpwatch.cli.commands.runs", "list the runs that the daemon knows"),
    "show": _Entry("sharpwatch.cli.commands.runs", "show one run: blocks, alerts, troubles"),
    "lr": _Entry("sharpwatch.cli.commands.lr", "learning-rate multipliers: show, set, history, undo", group=True),
    "rollback": _Entry("sharpwatch.cli.commands.decisions", "ask a trainer to go back to a checkpoint"),
    "mode": _Entry("sharpwatch.cli.commands.runs", "print or set a run's mode: observe, advise, enforce"),
    "decisions": _Entry("sharpwatch.cli.commands.decisions", "list what was decided, and what came of it"),
    "approve": _Entry("sharpwatch.cli.commands.decisions", "approve a proposed decision"),
    "reject": _Entry("sharpwatch.cli.commands.decisions", "reject a proposed decision"),
    "check-config": _Entry("sharpwatch.cli.commands.check_config", "check a daemon's configuration file"),
    "doctor": _Entry("sharpwatch.cli.doctor.doctor", "check this installation and its daemon"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; 0 done, 1 failed, 2 usage."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show ± is no reason to fail
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough. Python would flush once more at exit, into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SharpwatchError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return status


def _fail(message: str, status: int = 1) -> int:
    print(f"sharpwatch: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(argv: Sequence[str]) -> int:
    options, name, rest = _split(_top_parser(), tuple(_COMMANDS), argv, argparse.Namespace())
    entry = _COMMANDS[name]
    commands = _load(name, entry)
    prog = f"sharpwatch {name}"
    if not entry.asks_daemon:
        return _run_local(commands[name], Parser(prog=prog, description=entry.help), rest, options)
    if entry.group:
        parser = Parser(prog=prog, description=entry.help)
        add_global(parser)
        options, name, rest = _split(parser, tuple(commands), rest, options)
        prog = f"{prog} {name}"
    parser = Parser(prog=prog, description=None if entry.group else entry.help)
    add_global(parser)
    commands[name].arguments(parser)
    args = parser.parse_intermixed_args(rest, options)
    args.json = getattr(args, "json", False)
    return commands[name].run(args)


def _run_local(command: Command, parser: Parser, rest: Sequence[str], options: argparse.Namespace) -> int:
    if vars(options):
        given = ", ".join(f"--{key.replace('_', '-')}" for key in vars(options))
        parser.error(f"{given} is for commands that ask the daemon")
    command.arguments(parser)
    return command.run(parser.parse_args(rest))


def _split(
    parser: argparse.ArgumentParser, names: Sequence[str], argv: Sequence[str], options: argparse.Namespace
) -> tuple[argparse.Namespace, str, Sequence[str]]:
    """Options before the first of `names`, that name, and what follows it."""
    parser.add_argument("command", metavar="COMMAND", choices=names, help=", ".join(names))
    rest = parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="the command's own arguments")
    rest.required = False
    found = vars(parser.parse_args(argv, options))
    name, following = found.pop("command"), found.pop("rest")
    return argparse.Namespace(**found), name, following


def _top_parser() -> Parser:
    lines = "\n".join(f"  {name:<13} {entry.help}" for name, entry in _COMMANDS.items())
    parser = Parser(
        prog="sharpwatch",
        description="Per-block sharpness of a transformer in training: watched, alerted on, acted on.",
        epilog=f"commands:\n{lines}\n\n`sharpwatch COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sharpwatch {__version__}")
    add_global(parser)
    return parser


def _load(name: str, entry: _Entry) -> Mapping[str, Command]:
    """The commands of a module; a package that is not installed is an error that says what to install."""
    try:
        return importlib.import_module(entry.module).COMMANDS  # type: ignore[no-any-return]
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("sharpwatch"):
            raise
        install = f"pip install 'sharpwatch[{entry.extra}]'"
        raise SharpwatchError(
            f"{name} needs the package {missing.name}, which is not installed; run: {install}"
        ) from None
