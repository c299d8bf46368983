"""The files that a measurement leaves: checked before anything starts, written whole or not at all."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import ModuleType

from sharpwatch.common import atomic_file
from sharpwatch.errors import SharpwatchError


def check_writable(path: Path, option: str) -> None:
    """Raise `SharpwatchError` where `path`, given as `option`, could not be written at the end."""
    if path.is_dir():
        raise SharpwatchError(f"{option} {path}: is a folder; give a file")
    if not path.parent.is_dir():
        raise SharpwatchError(f"{option} {path}: there is no folder {path.parent}")
    try:
        # Asked of the file system itself: permission bits say nothing of a read-only mount, nor to root.
        with tempfile.TemporaryFile(dir=path.parent) if _is_ordinary(path) else path.open("ab"):
            pass
    except OSError as error:
        raise SharpwatchError(f"{option} {path}: can't be written: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that at every moment, and after any crash, it is the old or the new one."""
    try:
        if not _is_ordinary(path):  # a pipe or /dev/stdout
            path.write_bytes(content)
            return
        atomic_file.write_bytes(path, content)
    except OSError as error:
        raise SharpwatchError(f"{path}: can't be written: {error.strerror}") from error


def need(package: str, purpose: str) -> ModuleType:
    """Import `package`; where it is missing, raise `SharpwatchError` that says what to install."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as missing:
        install = "pip install 'sharpwatch[measure]'"
        raise SharpwatchError(
            f"{purpose} needs the package {missing.name}, which is not installed; run: {install}"
        ) from (None)


def _is_ordinary(path: Path) -> bool:
    return path.is_file() or not path.exists()
