"""Which journal a command is about that needs no running daemon."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from sharpwatch.cli.extras import needs_extra
from sharpwatch.errors import StoreError

_DEFAULT = "sqlite:///sharpwatch.db"


def journal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --store and --config to a command, which gets one argument `journal`: the path of the database."""

    @click.option("--store", metavar="URL", help=f"The journal. Default: the configuration's, or {_DEFAULT}.")
    @click.option(
        "--config", metavar="FILE", type=click.Path(path_type=Path), help="The daemon's configuration, for its journal."
    )
    @wraps(command)
    def with_journal(*args: Any, store: str | None, config: Path | None, **kwargs: Any) -> Any:
        return command(*args, journal=_path(store, config), **kwargs)

    return with_journal


def _path(store: str | None, config: Path | None) -> Path:
    from sharpwatch.daemon.storage.sqlite_file import database_path  # noqa: PLC0415 - loads numpy

    if store is None and config is not None:
        with needs_extra("--config", "daemon"):
            from sharpwatch.daemon.config.load import load_config  # noqa: PLC0415 - loads pydantic
        store = load_config(config).daemon.store
    url = store or _DEFAULT
    if url.startswith("postgresql"):
        raise StoreError("the journal is in PostgreSQL: use its own pg_dump, pg_restore and pg_amcheck")
    return database_path(url).absolute()
