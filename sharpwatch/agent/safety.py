"""Protects the training loop: the agent's exceptions are swallowed, its seconds counted, and signals deferred.

`ExceptionBarrier`: nothing that the agent does raises into the training loop, except `DesyncError`. `OverheadTimer`:
which seconds of a step are the agent's. `signals_held`: the program's signal handlers wait while the agent does what
must not be interrupted.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ten times as fast as `signal`, which makes enumerations
import inspect
import logging
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import FrameType
from typing import Any, Protocol

from sharpwatch.errors import DesyncError

_LOG = logging.getLogger("sharpwatch")
_REMEMBERED = 256  # distinct errors that are logged; further ones are only counted
_Handler = Callable[[int, FrameType | None], Any]
_NUMBERS = tuple(map(int, signal.valid_signals()))


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
            # The agent only happened to run; the program relies on its handler's exception to end.
            if from_signal_handler(error):
                raise
            self.swallowed += 1
            self._log(doing, error)

    def _log(self, doing: str, error: Exception) -> None:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        key = (doing, type(error).__name__, f"{frame.f_code.co_filename}:{line}")
        # An error that comes at every step must not fill the program's log, and the set must stay small.
        if key in self._logged or len(self._logged) >= _REMEMBERED:
            return
        self._logged.add(key)
        warn("%s failed; training continues (logged once): %s: %s", doing, type(error).__name__, error, error=error)

    def warn_once(self, message: str) -> None:
        """Log a warning, unless it was logged before."""
        key = (message, "", "")
        if key not in self._logged and len(self._logged) < _REMEMBERED:
            self._logged.add(key)
            warn("%s", message)


def warn(message: str, *arguments: object, error: Exception | None = None) -> None:
    """Log a warning, also where a handler or filter of the program raises."""
    with suppress(Exception):
        _LOG.warning(message, *arguments, exc_info=error)


def from_signal_handler(error: Exception) -> bool:
    """Whether a signal handler of the program raised `error` while the agent happened to run.

    Examples are torch's handler for DataLoader workers that die, and one that ends a preempted run. Python calls a
    handler with the frame that it interrupts; no other function is called with its caller's frame.
    """
    # Not by asking signal.getsignal: a handler that runs once has reset itself by then.
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


class OverheadTimer:
    """Splits the seconds of each step into the agent's and the loop's own."""

    def __init__(self) -> None:
        self._since: float | None = None  # when the step began
        self._agents = 0.0  # the agent's seconds in this step
        self._working: float | None = None  # when the agent's present work began

    def start(self) -> None:
        """Begin a step, unless one has begun."""
        self._since = self._since or perf_counter()

    def stop(self) -> None:
        """Forget the step: the time until the next `start` belongs to none."""
        self._since = None

    @contextmanager
    def agent(self) -> Iterator[None]:
        """Count the body's seconds as the agent's; nested bodies count once."""
        if self._working is not None:
            yield
            return
        self._working = perf_counter()
        try:
            yield
        finally:
            self._agents += perf_counter() - self._working
            self._working = None

    def lap(self) -> tuple[float, float] | None:
        """End a step: returns the loop's own seconds and the agent's, or None if its beginning was not seen."""
        now, since = perf_counter(), self._since
        # A lap falls within the agent's own work, which is divided between the two steps.
        if self._working is not None:
            self._agents += now - self._working
            self._working = now
        agents, self._agents, self._since = self._agents, 0.0, now
        return None if since is None else (max(0.0, now - since - agents), agents)


@contextmanager
def agent_work(doing: str, barrier: ExceptionBarrier, timer: OverheadTimer) -> Iterator[None]:
    """The body is the agent's own work: `barrier` swallows its errors, and `timer` counts its seconds."""
    with barrier.guard(doing), timer.agent():
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer the program's signal handlers until the end of the body; each signal is then raised again.

    During a probe a handler that saves a checkpoint would find other weights in the model, and one that raises would
    leave work half done. A signal that arrives a second time runs its handler at once. Handlers run in the main thread
    only, so in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, _Handler] = {}
    came: list[int] = []
    over = False

    def hold(number: int, frame: FrameType | None) -> Any:
        if over or number in came:
            return handlers[number](number, frame)
        came.append(number)
        return None

    for number in _NUMBERS:
        handler = _signal.getsignal(number)
        if callable(handler):  # not SIG_DFL, SIG_IGN, or a handler set outside of Python
            handlers[number] = handler
    try:
        for number in handlers:
            _signal.signal(number, hold)
        yield
    finally:
        over = True  # from here on `hold` runs the handler, should one that raises leave it in place
        for number, handler in handlers.items():
            if _signal.getsignal(number) is hold:  # otherwise the program has set another one since
                _signal.signal(number, handler)
        # After all handlers are back, as each of these may raise.
        for number in came:
            signal.raise_signal(number)


class Closeable(Protocol):
    """What is closed at the interpreter's end."""

    def close(self, *, in_order: bool) -> None:
        """Close it; `in_order` is whether no error ended the program."""


def closed_at_exit(watched: Closeable) -> Callable[[], None]:
    """Returns what `atexit` is to call; it keeps `watched` no longer alive than the program does."""
    # A strong reference would keep model and optimizers alive until the program's end.
    reference = weakref.ref(watched)

    def close() -> None:
        alive = reference()
        if alive is not None:
            # The interpreter leaves an error that ended the program in sys.last_value.
            alive.close(in_order=getattr(sys, "last_value", None) is None)

    return close
