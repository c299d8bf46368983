"""Ctrl-C at every line in turn: what must not be cut short is tried wherever it could be."""

from __future__ import annotations

import gc
import itertools
import signal
import sys


def interrupted_at(module, number, call):
    """Call with Ctrl-C pressed at line `number` of those of `module` that it runs; whether it was interrupted."""
    lines = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and next(lines) == number:
            signal.raise_signal(signal.SIGINT)
        return trace

    gc.disable()  # a watched run is in a cycle: one of an earlier test, collected now, would run lines of its own
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False
