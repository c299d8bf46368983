"""What torch holds of the loop: a callable that compiled code passes by and that copies of a model leave behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class Hook:
    """A hook for modules and optimizers; where it returns None, torch goes on with what it has."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call on, unless torch.compile traces us: a graph of ours, or a break for it, would change the user's own.

        Nor into a CUDA graph: it would replay what we launch, and to wait for the device breaks its capture.
        """
        return None if torch.compiler.is_compiling() or _is_capturing() else self._call(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """Copied or pickled with its model, it does nothing there, and needs no sharpwatch to be loaded."""
        return getattr, (nullcontext(), "__exit__")


def _is_capturing() -> bool:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()
