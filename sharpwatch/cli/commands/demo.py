"""`sharpwatch demo`: handed to `sharpwatch.demo`, whose packages only it needs."""

from __future__ import annotations

from sharpwatch.cli.arguments import Command
from sharpwatch.demo.main import add_arguments, run

COMMANDS = {"demo": Command(add_arguments, run)}
