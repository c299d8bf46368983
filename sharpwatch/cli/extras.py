"""Imports of packages that only some commands need; an error says which extra of sharpwatch installs them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from sharpwatch.errors import SharpwatchError


@contextmanager
def needs_extra(purpose: str, extra: str) -> Iterator[None]:
    """Import optional packages inside a `with` block.

    Args:
        purpose: What needs the packages, the subject of the error message.
        extra: The extra of sharpwatch that installs them.

    Raises:
        SharpwatchError: A package is missing; the message says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        # A missing module of our own is a defect, and no extra would install it.
        if missing.name is None or missing.name.startswith("sharpwatch"):
            raise
        raise SharpwatchError(
            f"{purpose} needs the package {missing.name}, which is not installed; "
            f"run: pip install 'sharpwatch[{extra}]'"
        ) from None


def need(package: str, purpose: str) -> ModuleType:
    """Import a package of the extra `measure`.

    Args:
        package: The name to import.
        purpose: What needs it, the subject of the error message.

    Raises:
        SharpwatchError: The package is missing; the message says what to install.
    """
    with needs_extra(purpose, "measure"):
        return importlib.import_module(package)
