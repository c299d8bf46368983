"""The parts of commands: argument types, shared options, and commands and groups with readable help."""

from __future__ import annotations

import gc
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from itertools import chain, pairwise, takewhile
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sharpwatch.cli.extras import needs_extra
from sharpwatch.common.endpoint import parse_address, parse_addresses
from sharpwatch.common.shards import parse_shard

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

DEFAULT_TIMEOUT = 120.0  # seconds to wait for a trainer's answer; steps of large models take tens of seconds
_HELP_WIDTH = 100
Number = TypeVar("Number", int, float)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


# Argument types


class ParsedText(click.ParamType[Any, Any]):
    """An argument type made from a parsing function, whose ValueError becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text of an argument; a default passes through unchanged."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def address(**rules: bool) -> ParsedText:
    """The type of an address.

    Args:
        rules: The keyword arguments of `parse_address`: whether sockets are valid, whether to listen there.
    """

    def parse(text: str) -> str:
        parse_address(text, **rules)
        return text

    return ParsedText("address", parse)


def _addresses(text: str) -> str:
    parse_addresses(text)
    return text


def _shard(text: str) -> str:
    return str(parse_shard(text))


def whole_number(minimum: int, why: str = "") -> ParsedText:
    """The type of a whole number.

    Args:
        minimum: The smallest valid number.
        why: The reason for the minimum, for the error message.
    """

    def parse(text: str) -> int:
        # At most 18 digits fit the wire's 64 bits. `int` alone would also take `1_000` and ` 5 `.
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < minimum:
            raise ValueError(f"{text!r} is not a whole number, {minimum} or more{why and f': {why}'}")
        return int(text)

    return ParsedText("number", parse)


def real(text: str) -> float:
    """Parse a number; a text that is not a number is nan, which no range contains."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _seconds(text: str) -> float:
    value = real(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{text!r} is not a positive number of seconds")
    return value


def _duration(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    value = real(text[:-1]) * units.get(text[-1:], math.nan)
    if not 1 <= value <= 30 * units["d"]:
        raise ValueError(f"{text!r} is not a duration; it must be 1s to 30d, such as 90s, 30m, 2h or 1d")
    return value


def _step_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"{text!r} is not a range of steps; it must be A:B with A < B, and does not include B")
    return int(match[1]), int(match[2])


def _multiplier(text: str) -> tuple[str, float]:
    block, _, factor = text.partition("=")
    value = real(factor)
    if not (block and math.isfinite(value) and value > 0):
        raise ValueError(f"{text!r} is not a multiplier; it must be BLOCK=FACTOR with a factor above 0, such as qk=0.5")
    return block, value


def _multiplier_list(text: str) -> tuple[tuple[str, float], ...]:
    return tuple(map(_multiplier, text.split(",")))


def _interval_list(text: str) -> tuple[tuple[str, int], ...]:
    return tuple(map(_interval, text.split(",")))


def _interval(text: str) -> tuple[str, int]:
    block, _, steps = text.partition("=")
    if not (block and re.fullmatch(r"[1-9]\d{0,8}", steps)):
        raise ValueError(f"{text!r} is not an update interval; it must be BLOCK=STEPS with 1 or more, such as emb=4")
    return block, int(steps)


def _stages(text: str) -> tuple[tuple[str, ...], ...]:
    stages = tuple(tuple(stage.split("+")) for stage in text.split(","))
    if not all(block for stage in stages for block in stage):
        raise ValueError(f"{text!r} does not name stages; they are blocks joined by + and stages by a comma: vo,ffn+qk")
    return stages


COUNT = whole_number(0)
SHARD = ParsedText("shard", _shard)
SECONDS = ParsedText("seconds", _seconds)
DURATION = ParsedText("duration", _duration)
STEP_RANGE = ParsedText("steps", _step_range)
MULTIPLIER = ParsedText("multiplier", _multiplier)
MULTIPLIERS = ParsedText("multipliers", _multiplier_list)
INTERVALS = ParsedText("intervals", _interval_list)
STAGES = ParsedText("stages", _stages)


# Shared options


@dataclass(slots=True)
class DaemonOptions:
    """The options that every command which asks the daemon takes, before or after the command's name."""

    address: str | None = None
    token_file: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    json: bool = False

    def given(self) -> list[str]:
        """The options on the command line, as they are written there."""
        return [f"--{field.name.replace('_', '-')}" for field in fields(self) if getattr(self, field.name)]


class SectionOption(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def _daemon_options() -> list[click.Parameter]:
    def option(name: str, **attributes: Any) -> SectionOption:
        return SectionOption([name], section="Daemon", expose_value=False, callback=_remember, **attributes)

    return [
        option(
            "--address",
            type=ParsedText("address", _addresses),
            metavar="ADDRESS",
            help="The daemon: HOST:PORT or unix:PATH; with commas between them those of all shards. "
            "Default: $SHARPWATCH_ADDRESS, then 127.0.0.1:7741.",
        ),
        option(
            "--token-file",
            type=click.Path(),
            metavar="FILE",
            help="Your token. Default: $SHARPWATCH_TOKEN_FILE, then ~/.config/sharpwatch/operator.token.",
        ),
        option(
            "--tls-ca",
            type=click.Path(),
            metavar="FILE",
            help="Connect by TLS, and trust these authorities. Default: $SHARPWATCH_TLS_CA; without, no TLS.",
        ),
        option(
            "--tls-cert",
            type=click.Path(),
            metavar="FILE",
            help="Your certificate, if the daemon asks for one. Default: $SHARPWATCH_TLS_CERT.",
        ),
        option("--tls-key", type=click.Path(), metavar="FILE", help="Its key. Default: $SHARPWATCH_TLS_KEY."),
        option("--json", is_flag=True, help="Print JSON."),
    ]


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a daemon option in the object that all contexts of a command line share; the last one given counts."""
    options = ctx.ensure_object(DaemonOptions)
    if value:
        # Only a value that was given: the defaults of the command would erase what stood before its name.
        setattr(options, str(param.name), value)


def gather_lists(
    ctx: click.Context, param: click.Parameter, value: Sequence[Sequence[tuple[str, Number]]]
) -> Mapping[str, Number]:
    """The callback of a repeatable option whose values each name several blocks."""
    return gather(ctx, param, tuple(chain.from_iterable(value)))


def gather(ctx: click.Context, param: click.Parameter, value: Sequence[tuple[str, Number]]) -> Mapping[str, Number]:
    """The callback of a parameter that gives each block its number, once."""
    gathered: dict[str, Number] = {}
    for block, factor in value:
        if block in gathered:
            raise click.BadParameter(f"{block} is given twice", ctx, param)
        gathered[block] = factor
    return gathered


def multipliers_argument() -> Decorator:
    """The arguments BLOCK=FACTOR, passed to the command as a dict."""
    return click.argument(
        "multipliers",
        metavar="BLOCK=FACTOR...",
        nargs=-1,
        type=MULTIPLIER,
        callback=gather,
        help="The learning-rate multiplier of a block, such as qk=0.5. Blocks that are not named keep theirs.",
    )


def reason_option(*, required: bool = False) -> Decorator:
    """The option --reason."""
    default: dict[str, Any] = {} if required else {"default": ""}
    return click.option("--reason", metavar="TEXT", required=required, help="Why; kept in the history.", **default)


def wait_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --no-wait and --timeout to a command, which gets one argument `timeout`: seconds, or None not to wait."""

    @click.option("--no-wait", is_flag=True, help="Return as soon as the daemon has accepted the command.")
    @click.option(
        "--timeout",
        metavar="SECONDS",
        type=SECONDS,
        default=DEFAULT_TIMEOUT,
        help=f"How long to wait for the trainer's answer. Default: {DEFAULT_TIMEOUT:g}.",
    )
    @wraps(command)
    def with_timeout(*args: Any, no_wait: bool, timeout: float, **kwargs: Any) -> Any:
        return command(*args, timeout=None if no_wait else timeout, **kwargs)

    return with_timeout


# Commands and groups


class ReadableCommand(click.Command):
    """A command whose help has its options under headings, and an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs["context_settings"] = {"help_option_names": ["-h", "--help"], "max_content_width": _HELP_WIDTH}
        super().__init__(*args, **kwargs)
        self.example = example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse the name of an option in the place of a value: click would take it as the value."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        with_value = {name for option in options if not option.is_flag for name in option.opts}
        # Behind `--` everything is an argument, also what looks like an option.
        for option, value in pairwise(takewhile("--".__ne__, args)):
            if option in with_value and value in names and not ctx.resilient_parsing:
                raise click.UsageError(f"{option} has no value; if {value} is its value, write {option}={value}", ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in self.example.splitlines()))


class DaemonCommand(ReadableCommand):
    """A command that asks the daemon. Its function takes the `DaemonOptions` with `click.pass_obj`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _daemon_options()


class LocalCommand(ReadableCommand):
    """A command that needs no running daemon, and refuses the options of those that do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse daemon options that stand before the command's name."""
        options = ctx.find_object(DaemonOptions)
        if options is not None and options.given():
            raise click.UsageError(f"{', '.join(options.given())} is for commands that ask the daemon", ctx)
        return super().parse_args(ctx, args)


def _require_command() -> None:
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None and isinstance(ctx.command, click.Group):
        raise click.UsageError(f"missing command; choose from {', '.join(ctx.command.list_commands(ctx))}", ctx)


class CommandGroup(DaemonCommand, click.Group):
    """A group of commands that takes the daemon's options before the command's name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args,
            callback=_require_command,
            invoke_without_command=True,
            subcommand_metavar="COMMAND [ARGS]...",
            **kwargs,
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order they were added."""
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the error for an unknown one lists the known ones."""
        names = self.list_commands(ctx)
        # While a shell completes, a half-written word is no error.
        if args[0] not in names and not ctx.resilient_parsing:
            raise click.UsageError(f"no command {args[0]!r}; choose from {', '.join(names)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each with the first sentence of its help."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(limit=300)) for name, each in self.commands.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options."""
        self.format_commands(ctx, formatter)
        ReadableCommand.format_options(self, ctx, formatter)


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is defined, and its line in the help.

    Attributes:
        section: The heading of the command in the help.
        help: What the command does, in one line.
        target: `module:attribute` of the click command.
    """

    section: str
    help: str
    target: str

    def load(self, name: str) -> click.Command:
        """Import the command, and end the pause of the garbage collector that `main` began."""
        module, _, attribute = self.target.partition(":")
        with needs_extra(name, "cli"):
            command: click.Command = getattr(importlib.import_module(module), attribute)
        if not gc.isenabled():
            gc.freeze()  # modules are never garbage
            gc.enable()
        return command


class LazyGroup(CommandGroup):
    """A group that imports a command only when it runs, so that no command waits for the imports of another."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        del ctx
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        del ctx
        return self._lazy[cmd_name].load(cmd_name) if cmd_name in self._lazy else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, without importing them."""
        del ctx
        for section in dict.fromkeys(entry.section for entry in self._lazy.values()):
            with formatter.section(section):
                formatter.write_dl([(name, each.help) for name, each in self._lazy.items() if each.section == section])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        """Complete a command's name, without importing any, or an option."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only for completion

        found = [
            CompletionItem(name, help=entry.help) for name, entry in self._lazy.items() if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)
