"""`module:function` on the command line: the user's own code, called, and its failures named."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharpwatch.errors import SharpwatchError

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(text: str) -> bool:
    """Whether `text` is written as `module:function`."""
    return _FACTORY.fullmatch(text) is not None


def call(factory: str) -> Any:
    """What `module:function` returns, called without arguments; modules of the current directory are found first.

    Raises `SharpwatchError` that says where the user's code failed.
    """
    function = _find(factory)
    try:
        return function()
    except Exception as error:
        raise SharpwatchError(f"{factory} raised {_told(error)}") from error


def _find(factory: str) -> Callable[[], Any]:
    name, _, attribute = factory.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise SharpwatchError(f"{factory}: importing {name} raised {_told(error)}") from error
        raise SharpwatchError(f"{factory}: there is no module {error.name} in {here} or installed") from error
    except Exception as error:
        raise SharpwatchError(f"{factory}: importing {name} raised {_told(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = "is not a function" if hasattr(module, attribute) else "is not there"
        raise SharpwatchError(f"{factory}: {attribute} {there}, in {module.__file__}")
    return function  # type: ignore[no-any-return]


def _told(error: Exception) -> str:
    """The error and the line it came from: one line has to do where a traceback would stand."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"
