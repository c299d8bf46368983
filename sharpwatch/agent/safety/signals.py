"""Signals that come in the midst of what must not be cut short wait until it has ended."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enumerations of what it has: ten times as long
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
    """A context in which the program's signal handlers don't run; what came is raised again at its end.

    A handler that saves a checkpoint would find a probe's weights in the model, and one that raises would end half-way
    what is under way. A signal that comes a second time is not held: someone insists. Handlers run in the main thread
    alone, so in another nothing is done.
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
        if callable(handler):  # SIG_DFL, SIG_IGN and what was set outside of Python are left
            handlers[number] = handler
    try:
        for number in handlers:
            _signal.signal(number, hold)
        yield
    finally:
        over = True  # one that raises may leave `hold` in the place of others: it then passes them on
        for number, handler in handlers.items():
            if _signal.getsignal(number) is hold:  # else somebody has set another meanwhile
                _signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
