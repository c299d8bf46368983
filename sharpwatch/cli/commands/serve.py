"""`sharpwatch serve`, `check-config` and `demo`: the commands that run a daemon or the demo on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharpwatch.cli.commands.runs import override_words
from sharpwatch.cli.extras import needs_extra
from sharpwatch.cli.options import SHARD, DaemonCommand, DaemonOptions, LocalCommand, address, whole_number
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.common.endpoint import without_password
from sharpwatch.demo.recipe import FAULTS, MODELS, MODES, DemoOptions
from sharpwatch.errors import SharpwatchError

if TYPE_CHECKING:
    from sharpwatch.daemon.config.settings import Config

_LOG_LEVELS = ("debug", "info", "warning", "error")
_FILE = click.Path(path_type=Path)


@click.command(cls=LocalCommand, example="sharpwatch serve --config sharpwatch.yaml")
@click.option("--config", metavar="FILE", type=_FILE, help="YAML. Default: all defaults, no policies.")
@click.option(
    "--grpc", metavar="ADDRESS", type=address(listen=True), help="For agents and operators: HOST:PORT or unix:PATH."
)
@click.option(
    "--http", metavar="ADDRESS", type=address(sockets=False, listen=True), help="For metrics and health: HOST:PORT."
)
@click.option("--store", metavar="URL", help="The journal, such as sqlite:///sharpwatch.db.")
@click.option(
    "--shard", metavar="INDEX/COUNT", type=SHARD, help="Serve this part of the runs of a journal on PostgreSQL: 0/4."
)
@click.option("--advertise", metavar="ADDRESS", type=address(), help="Where agents reach it. Default: as --grpc.")
@click.option("--log-level", type=click.Choice(_LOG_LEVELS), help="The least severity to log.")
def serve(config: Path | None, **overrides: Any) -> int:
    """Run the daemon until SIGTERM or Ctrl-C.

    The other options override the configuration file. Port 0 takes a free port. SIGHUP has the daemon read the file
    anew: policies, detection, autopilot and maintenance change at once, what needs a restart is named in its log.
    """
    with needs_extra("serve", "daemon"):
        from sharpwatch.daemon.app import run  # noqa: PLC0415 - loads torch, which takes seconds
        from sharpwatch.daemon.config.load import load_config  # noqa: PLC0415 - as above
    # An option that was not given is None, and must not replace the file's value.
    given = {name: value for name, value in overrides.items() if value is not None}

    def load() -> Config:
        loaded = load_config(config)
        return dataclasses.replace(loaded, daemon=dataclasses.replace(loaded.daemon, **given))

    return run(load(), load)


def _print_schema(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value:
        with needs_extra("check-config", "daemon"):
            from sharpwatch.daemon.config.load import json_schema  # noqa: PLC0415 - loads pydantic
        print(json.dumps(json_schema(), indent=2))
        # The option is eager and ends the command here, since FILE is required but no schema needs it.
        ctx.exit()


@click.command("check-config", cls=DaemonCommand, example="sharpwatch check-config sharpwatch.yaml")
@click.argument("file", metavar="FILE", type=_FILE, help="The daemon's configuration, YAML.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of the file, for editors, and exit.",
)
@click.pass_obj
def check_config(options: DaemonOptions, file: Path) -> None:
    """Check a daemon's configuration file: print its addresses and policies, or the file, line and key of an error."""
    with needs_extra("check-config", "daemon"):
        from sharpwatch.daemon.api.auth import check_doors  # noqa: PLC0415 - loads pydantic
        from sharpwatch.daemon.config.load import load_config  # noqa: PLC0415 - as above
    config = load_config(file)
    try:
        check_doors(config.daemon)
    except SharpwatchError as error:
        raise SharpwatchError(f"{file}: daemon.{error}") from None
    config = dataclasses.replace(
        config, daemon=dataclasses.replace(config.daemon, store=without_password(config.daemon.store))
    )
    # `from_` is `from` in the file.
    fields = dataclasses.asdict(
        config, dict_factory=lambda items: {name.removesuffix("_"): each for name, each in items}
    )
    payload = {"file": str(file), "valid": True, **fields}
    print_answer(payload, describe_config(file, config), as_json=options.json)


def describe_config(file: Path, config: Config) -> list[Grid]:
    """The addresses of a configuration, whom it tells and asks, its policies, and what changes them for some runs."""
    from sharpwatch.daemon.config.settings import OVERRIDABLE  # noqa: PLC0415 - loads pydantic
    from sharpwatch.daemon.webhooks import shown_webhook  # noqa: PLC0415 - as above

    daemon, tells, asks, autopilot = config.daemon, config.notifications, config.gate, config.autopilot
    rules = [name for name in ("curvature_share", "stability_cap") if getattr(autopilot, name) is not None]
    facts = (
        ("config", f"{file} is valid"),
        ("grpc", daemon.grpc),
        ("http", daemon.http),
        ("store", daemon.store),
        (
            "notifications",
            f"{shown_webhook(tells.webhook)}, incidents of severity {tells.severity} and up"
            if tells.webhook
            else "none",
        ),
        ("gate", f"{shown_webhook(asks.webhook)}, no answer in {asks.timeout:g} s is no" if asks.webhook else "none"),
        ("autopilot", f"{', '.join(rules)}, mode {autopilot.mode}" if rules else "off"),
        *(("maintenance", f"{each.from_} to {each.to} UTC on {', '.join(each.days)}") for each in config.maintenance),
    )
    policies = tuple(
        (each.name, each.match.answered, "observe (dry run)" if each.dry_run else each.mode, each.action.kind)
        for each in config.policies
    )
    overrides = tuple(
        (
            ", ".join(f"{name}={value}" for name, value in sorted(each.match.items())),
            *(override_words(key, each.changes[key]) if key in each.changes else "" for key in OVERRIDABLE),
        )
        for each in config.detection.overrides
    )
    return [
        Grid("ll", facts),
        Grid("llll", policies, ("policy", "answers", "mode", "action"), empty="no policy"),
        *([Grid("lrrr", overrides, ("detection of", *OVERRIDABLE))] if overrides else []),
    ]


@click.command(cls=LocalCommand, example="sharpwatch demo --model gpt2 --fault lr-jump")
@click.option("--model", type=click.Choice(MODELS), help="Train only this one. Default: one after the other.")
@click.option("--steps", metavar="N", type=whole_number(1), default=400, help="Optimizer steps.", show_default=True)
@click.option("--fault", type=click.Choice(FAULTS), default="lr-jump", help="What goes wrong.", show_default=True)
@click.option("--mode", type=click.Choice(MODES), default="enforce", help="What the policy may do.", show_default=True)
@click.option("--json", metavar="FILE", type=_FILE, help="Write the result to a file; no live view.")
@click.option(
    "--folder",
    metavar="FOLDER",
    type=_FILE,
    default=Path(".demo"),
    help="Where to keep runs and the tokenised text.",
    show_default=True,
)
@click.option("--seed", metavar="N", type=int, default=0, help="Of weights, data and fault.", show_default=True)
def demo(**options: Any) -> int:
    """Watch a small transformer train on real text, break at the middle of its run, and recover."""
    with needs_extra("demo", "demo"):
        from sharpwatch.demo.main import run  # noqa: PLC0415 - loads torch and transformers
    return run(DemoOptions(**options))
