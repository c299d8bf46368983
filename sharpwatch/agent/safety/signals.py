"""Defers the program's signal handlers while the agent does what must not be cut short."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ten times as fast as `signal`, which makes enumerations
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]
_NUMBERS = tuple(map(int, signal.valid_signals()))


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
        for number in came:
            signal.raise_signal(number)
