"""The daemon's log: one line an event, without secrets, of bounded length."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MAX_LINE = 4_096  # characters; a client can make the daemon log what it sent
_SHORTER = (1_500, 400, 100)  # characters of each value, tried one after the other
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@\"']*@", re.IGNORECASE)  # user and password in an URL
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]+", re.IGNORECASE)
_CONSOLE = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
_ALWAYS = ("event", "level", "timestamp")


def configure_logs(level: str) -> None:
    """Sends the events of structlog and of the standard library (aiohttp, asyncio, grpc) to stderr in one form.

    Args:
        level: The lowest level that is logged: debug, info, warning or error.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # JSON for machines: `sharpwatch demo` reads the addresses from the event `serving`. Plain tracebacks in both forms:
    # structlog's richer ones show what local variables hold, tokens among them.
    terminal = sys.stderr.isatty()
    renderer: list[Processor] = (
        [without_secrets, _render_console]
        if terminal
        else [structlog.processors.format_exc_info, without_secrets, render_json]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),  # names: from 25.1 on
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def without_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Takes users and passwords out of URLs, and tokens out of headers, wherever in an event they stand."""
    del logger, method
    return {key: _clean(value) for key, value in event.items()}


def render_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    """An event as a line of JSON; where it would be too long, its values are cut, as little as need be."""
    del logger, method
    line = _json(event)
    for most in _SHORTER:
        if len(line) <= MAX_LINE:
            return line
        line = _json({key: _shortened(key, value, most) for key, value in event.items()})
    # Very many values.
    return line if len(line) <= MAX_LINE else _json({key: _shortened(key, event.get(key), 1_000) for key in _ALWAYS})


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _BEARER.sub(r"\1***", _USER.sub(r"\1***@", value))
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(_clean, value))
    return value


def _shortened(key: str, value: Any, most: int) -> Any:
    text = value if isinstance(value, str) else _json(value)
    if len(text) <= most:
        return value
    # The end of a traceback has the error.
    return f"... {text[-most:]}" if key == "exception" else f"{text[:most]} ..."


def _json(value: Any) -> str:
    return json.dumps(value, default=repr)


def _render_console(logger: WrappedLogger, method: str, event: EventDict) -> str:
    line = str(_CONSOLE(logger, method, event))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 4]} ..."
