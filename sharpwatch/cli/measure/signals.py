"""Ctrl-C and SIGTERM wait for the piece of work under way, so that it is not lost."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

_ASKED = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Inside, `asked` is the signal that asked for an end, 0 for none; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._received) for number in _ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's signature
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        # Not print: the handler may run in the middle of another write to the same stream.
        os.write(2, b"\nsharpwatch measure: stopping after this piece; again to stop at once\n")
