"""A measurement on disk, so that a killed one goes on from its last piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sharpwatch.cli.measure.files import write_whole
from sharpwatch.errors import ProbeError, SharpwatchError

_FORMAT = "sharpwatch measure 1"
_EVERY = 1.0  # seconds between two writes, at least: a piece may take a millisecond


class Resumable(Protocol):
    """The part of a `Measurement` that a file needs."""

    def state_dict(self) -> dict[str, Any]:
        """All draws so far."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from them; raises `ProbeError` where they are of another measurement."""


@dataclass(slots=True)
class StateFile:
    """The draws of one measurement, in the file `path`."""

    path: Path
    clock: Callable[[], float] = time.monotonic
    trouble: str = field(default="", init=False)  # why the newest write failed; empty where it did not
    _written: float = field(default=-_EVERY, init=False)

    def load(self, measurement: Resumable, kept: dict[str, Any]) -> None:
        """Go on from `kept`, what `read_state` found; raises `SharpwatchError` that names what differs."""
        try:
            measurement.load_state_dict(kept["measurement"])
        except ProbeError as error:
            raise SharpwatchError(f"--state {self.path}: {error}; move it away, or measure as then") from error
        except (KeyError, TypeError) as error:  # what is in it is not what this engine writes
            raise SharpwatchError(f"--state {self.path}: was written by another sharpwatch; move it away") from error

    def save_if_due(self, measurement: Resumable) -> None:
        """Save the first time, and then at most once in `_EVERY` seconds."""
        if self.clock() - self._written >= _EVERY:
            self.save(measurement)

    def save(self, measurement: Resumable) -> None:
        """Write everything so far; the file is the old or the new one at every moment.

        A full disk is only noted: it would be the wrong reason to throw a measurement away.
        """
        kept = {"format": _FORMAT, "measurement": measurement.state_dict()}
        try:
            write_whole(self.path, json.dumps(kept).encode())
            self.trouble = ""
        except SharpwatchError as error:
            self.trouble = str(error)
        self._written = self.clock()


def read_state(path: Path) -> dict[str, Any] | None:
    """What is in `path`, None where there is no such file; raises `SharpwatchError` where it is anything else."""
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SharpwatchError(f"--state {path}: can't be read: {error.strerror}") from error
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or kept.get("format") != _FORMAT:
        raise SharpwatchError(f"--state {path}: exists and is not the state of a measurement; give another file")
    return kept
