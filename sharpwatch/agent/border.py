"""The host-safety border: nothing the agent does raises into the training loop."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("sharpwatch")
_REMEMBERED = 256  # distinct errors; past that they are counted only


class Border:
    """Counts every swallowed error and logs each distinct one (place and type) once."""

    def __init__(self) -> None:
        self.swallowed = 0
        self._logged: set[tuple[str, str, str]] = set()

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Run the body; what it raises ends here."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - this is the border
            self._swallow(doing, error)

    def _swallow(self, doing: str, error: Exception) -> None:
        self.swallowed += 1
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        key = (doing, type(error).__name__, place)
        if key in self._logged or len(self._logged) >= _REMEMBERED:
            return
        self._logged.add(key)
        _LOG.warning(
            "%s failed, training goes on (logged once): %s: %s", doing, type(error).__name__, error, exc_info=error
        )
