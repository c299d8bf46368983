"""The exception barrier: nothing that the agent does raises into the training loop, except `DesyncError`."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from sharpwatch.errors import DesyncError

_LOG = logging.getLogger("sharpwatch")
_REMEMBERED = 256  # distinct errors that are logged; further ones are only counted


class ExceptionBarrier:
    """Swallows the agent's errors: counts each, and logs each distinct one (by place and type) once."""

    def __init__(self) -> None:
        self.swallowed = 0
        self._logged: set[tuple[str, str, str]] = set()

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Run the body and swallow what it raises; `doing` names it in the log.

        Raises:
            DesyncError: Ranks are out of step.
            Exception: One that a signal handler of the program raised while the body ran.
        """
        try:
            yield
        except DesyncError:
            raise
        except Exception as error:
            if from_signal_handler(error):
                raise
            self.swallowed += 1
            self._log(doing, error)

    def _log(self, doing: str, error: Exception) -> None:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        key = (doing, type(error).__name__, f"{frame.f_code.co_filename}:{line}")
        if key in self._logged or len(self._logged) >= _REMEMBERED:
            return
        self._logged.add(key)
        warn("%s failed; training continues (logged once): %s: %s", doing, type(error).__name__, error, error=error)


def warn(message: str, *arguments: object, error: Exception | None = None) -> None:
    """Log a warning, also where a handler or filter of the program raises."""
    with suppress(Exception):
        _LOG.warning(message, *arguments, exc_info=error)


def from_signal_handler(error: Exception) -> bool:
    """Whether a signal handler of the program raised `error` while the agent happened to run.

    Examples are torch's handler for DataLoader workers that die, and one that ends a preempted run. Python calls a
    handler with the frame that it interrupts; no other function is called with its caller's frame.
    """
    return any(
        frame.f_back is not None and any(value is frame.f_back for value in _arguments(frame))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _arguments(frame: FrameType) -> Iterator[object]:
    """The arguments that `frame` was called with, as far as its variables still hold them."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    values = frame.f_locals
    yield from (values.get(name) for name in code.co_varnames[:count])
    if code.co_flags & inspect.CO_VARARGS:
        yield from values.get(code.co_varnames[count], ())
