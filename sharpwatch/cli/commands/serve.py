"""`sharpwatch serve`: the daemon, with its configuration's addresses and store overridable."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from sharpwatch.cli.arguments import Command, listening, listening_port
from sharpwatch.daemon.app import run
from sharpwatch.daemon.config.load import load_config

_OVERRIDES = ("grpc", "http", "store", "log_level")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML (default: all defaults, no policies)")
    parser.add_argument("--grpc", metavar="ADDR", type=listening, help="agents and operators: HOST:PORT or unix:PATH")
    parser.add_argument("--http", metavar="ADDR", type=listening_port, help="metrics and health: HOST:PORT")
    parser.add_argument("--store", metavar="URL", help="journal, such as sqlite:///sharpwatch.db")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="least severity to log")


def _serve(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    given = {name: value for name in _OVERRIDES if (value := getattr(args, name)) is not None}
    return run(dataclasses.replace(config, daemon=dataclasses.replace(config.daemon, **given)))


COMMANDS = {"serve": Command(_arguments, _serve)}
