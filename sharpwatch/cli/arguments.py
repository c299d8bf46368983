"""What can be written on the command line, and the one line that answers what can't."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from sharpwatch.common.endpoint import parse_address

DEFAULT_TIMEOUT = 120.0  # seconds to wait for a trainer's answer; steps of large models take tens of seconds


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what it reads from the command line, and what it does."""

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and exits 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit 2 with one line."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def address(text: str) -> str:
    """HOST:PORT or unix:PATH, to connect to."""
    return _checked(text)


def listening(text: str) -> str:
    """HOST:PORT or unix:PATH, to listen on; port 0 takes a free one."""
    return _checked(text, listen=True)


def listening_port(text: str) -> str:
    """HOST:PORT, to listen on; port 0 takes a free one."""
    return _checked(text, sockets=False, listen=True)


def _checked(text: str, **rules: bool) -> str:
    try:
        parse_address(text, **rules)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def steps(text: str) -> tuple[int, int]:
    """A:B, the steps from A up to, not with, B."""
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; allowed: A:B with A < B, B not included")
    return int(match[1]), int(match[2])


def multiplier(text: str) -> tuple[str, float]:
    """BLOCK=FACTOR, the factor finite and above 0."""
    block, _, factor = text.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if not (block and math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no multiplier; allowed: BLOCK=FACTOR, such as qk=0.5, above 0")
    return block, value


class _Multipliers(argparse.Action):
    """Gathers BLOCK=FACTOR pairs into a dict; a block given twice is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's signature
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - argparse's signature
    ) -> None:
        gathered: dict[str, float] = {}
        for block, factor in cast("Sequence[tuple[str, float]]", values):
            if block in gathered:
                raise argparse.ArgumentError(self, f"{block} is given twice")
            gathered[block] = factor
        setattr(namespace, self.dest, gathered)


def add_global(parser: argparse.ArgumentParser) -> None:
    """Options of every command that asks the daemon; no defaults, so that they can stand before or after a command."""
    parser.add_argument(
        "--address",
        type=address,
        default=argparse.SUPPRESS,
        help="the daemon: HOST:PORT or unix:PATH (default: $SHARPWATCH_ADDRESS, then 127.0.0.1:7741)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="operator's token (default: $SHARPWATCH_TOKEN_FILE, then ~/.config/sharpwatch/operator.token)",
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def add_run(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RUN."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?" if optional else None, help="a run's name, or the start of it that no other has"
    )


def add_multipliers(parser: argparse.ArgumentParser) -> None:
    """BLOCK=FACTOR ..."""
    parser.add_argument(
        "multipliers",
        metavar="BLOCK=FACTOR",
        nargs="+",
        type=multiplier,
        action=_Multipliers,
        help="learning-rate multiplier of a block, such as qk=0.5; blocks not named keep theirs",
    )


def add_reason(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """--reason TEXT, kept in the audit."""
    parser.add_argument("--reason", metavar="TEXT", default="", required=required, help="why; kept with the decision")


def add_waiting(parser: argparse.ArgumentParser) -> None:
    """Whether, and how long, to wait for the trainer's answer."""
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the daemon has taken it")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=DEFAULT_TIMEOUT,
        help=f"seconds to wait for the trainer's answer (default: {DEFAULT_TIMEOUT:g})",
    )
