"""The files of a measurement: outputs, written whole or not at all, and the state that a stopped one continues from."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sharpwatch.common import atomic_file
from sharpwatch.errors import ProbeError, SharpwatchError

_FORMAT = "sharpwatch measure 1"
_SAVE_SECONDS = 1.0  # at least, between two writes of the state: a piece of work may take a millisecond


# Outputs


def check_writable(path: Path, option: str) -> None:
    """Check that an output can be written.

    Args:
        path: The file, which is left unchanged.
        option: The option that names it, for the error message.

    Raises:
        SharpwatchError: The file cannot be written.
    """
    if path.is_dir():
        raise SharpwatchError(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise SharpwatchError(f"{option} {path}: there is no folder {path.parent}")
    try:
        # By writing: permission bits say nothing about a read-only mount, or to root.
        with tempfile.TemporaryFile(dir=path.parent) if _is_ordinary(path) else path.open("ab"):
            pass
    except OSError as error:
        raise SharpwatchError(f"{option} {path}: can't be written: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at every moment, and after any crash, it is the old or the new one.

    Args:
        path: The file.
        content: What to write.

    Raises:
        SharpwatchError: The file cannot be written.
    """
    try:
        if not _is_ordinary(path):  # a pipe or /dev/stdout
            path.write_bytes(content)
            return
        atomic_file.write_bytes(path, content)
    except OSError as error:
        raise SharpwatchError(f"{path}: can't be written: {error.strerror}") from error


def _is_ordinary(path: Path) -> bool:
    return path.is_file() or not path.exists()


# State


class Resumable(Protocol):
    """The part of a `Measurement` that a state file needs."""

    def state_dict(self) -> dict[str, Any]:
        """All draws so far."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue from them; raises `ProbeError` if they are from another measurement."""


@dataclass(slots=True)
class StateFile:
    """The file that keeps the draws of one measurement.

    Attributes:
        path: The file.
        clock: Seconds, for the time between two writes.
        trouble: Why the newest write failed; empty if it succeeded.
    """

    path: Path
    clock: Callable[[], float] = time.monotonic
    trouble: str = field(default="", init=False)
    _written: float = field(default=-_SAVE_SECONDS, init=False)

    def load(self, measurement: Resumable, kept: dict[str, Any]) -> None:
        """Continue a measurement from its state.

        Args:
            measurement: The measurement, with nothing drawn yet.
            kept: The return value of `read_state`.

        Raises:
            SharpwatchError: The state is from another measurement; the message names the difference.
        """
        try:
            measurement.load_state_dict(kept["measurement"])
        except ProbeError as error:
            raise SharpwatchError(
                f"--state {self.path}: {error}; move the file away, or repeat that measurement's options"
            ) from error
        except (KeyError, TypeError) as error:  # not in the form that this version writes
            raise SharpwatchError(
                f"--state {self.path}: was written by another version of sharpwatch; move the file away"
            ) from error

    def save_if_due(self, measurement: Resumable) -> None:
        """Save at the first call, and then at most once in `_SAVE_SECONDS` seconds."""
        if self.clock() - self._written >= _SAVE_SECONDS:
            self.save(measurement)

    def save(self, measurement: Resumable) -> None:
        """Write all draws so far.

        A failure, such as a full disk, is only noted in `trouble`: it is no reason to lose a measurement.
        """
        kept = {"format": _FORMAT, "measurement": measurement.state_dict()}
        try:
            write_whole(self.path, json.dumps(kept).encode())
            self.trouble = ""
        except SharpwatchError as error:
            self.trouble = str(error)
        # After a failure too: a full disk is then tried once a second, not at each piece.
        self._written = self.clock()


def read_state(path: Path) -> dict[str, Any] | None:
    """Read the state of a measurement.

    Args:
        path: The file.

    Returns:
        The state, or None if there is no such file.

    Raises:
        SharpwatchError: The file cannot be read, or is something else.
    """
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SharpwatchError(f"--state {path}: can't be read: {error.strerror}") from error
    except ValueError:
        kept = None
    # Refused rather than replaced: the option may name a file that has nothing to do with this.
    if not isinstance(kept, dict) or kept.get("format") != _FORMAT:
        raise SharpwatchError(f"--state {path}: exists and is not the state of a measurement; name another file")
    return kept
