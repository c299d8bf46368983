"""`sharpwatch check-config`: what a daemon would make of its configuration file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from sharpwatch.cli.arguments import Command
from sharpwatch.cli.output.output import show
from sharpwatch.cli.output.tables import Grid
from sharpwatch.daemon.config.config import Config
from sharpwatch.daemon.config.load import json_schema, load_config


class _PrintSchema(argparse.Action):
    """Prints the schema and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(json.dumps(json_schema(), indent=2))
        parser.exit()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="the daemon's configuration, YAML")
    parser.add_argument("--schema", action=_PrintSchema, nargs=0, help="print the JSON schema of the file, for editors")


def _check(args: argparse.Namespace) -> int:
    config = load_config(args.file)
    payload = {"file": str(args.file), "valid": True, **dataclasses.asdict(config)}
    show(args, payload, describe(args.file, config))
    return 0


def describe(file: Path, config: Config) -> list[Grid]:
    """The addresses and the policies in force."""
    daemon = config.daemon
    facts = (("config", f"{file} is valid"), ("grpc", daemon.grpc), ("http", daemon.http), ("store", daemon.store))
    policies = tuple((policy.name, policy.match.alert, policy.mode, policy.action.kind) for policy in config.policies)
    return [Grid("ll", facts), Grid("llll", policies, ("policy", "alert", "mode", "action"), empty="no policy")]


COMMANDS = {"check-config": Command(_arguments, _check)}
