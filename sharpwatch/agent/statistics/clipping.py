"""How much a loop clips its gradients, seen where torch's `clip_grad_norm_` scales them.

The tap reads gradients after clipping, where the norms of all blocks together are at most the limit: one block that
grows makes the others shrink. One factor undoes that.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from sharpwatch.agent.statistics.host_copy import AsyncHostCopy, Number, copied, is_ready, number
from sharpwatch.curvature.parameters.shards import local_tensor

_EPSILON = 1e-6  # that torch adds to the norm
_MAX_CLIPS = 4096  # of a step, the newest: a loop may clip every parameter by itself
# `clip_grad_norm_` finds it by the first name at each call, however it was imported; the second one is public.
_NAMES = ((clip_grad, "_clip_grads_with_norm_"), (torch.nn.utils, "clip_grads_with_norm_"))

_WRAPS = "_sharpwatch_wraps"  # the attribute by which `remove` finds what was there before
AfterClip = Callable[[], None]


class ClipHook(Protocol):
    """Called before gradients are scaled; what it returns is called after it, if it is not None."""

    def __call__(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor, /) -> AfterClip | None:
        """Gradients of `parameters`, whose norm is `total_norm`, are about to be scaled down to `max_norm`."""


_hooks: list[weakref.WeakMethod[ClipHook]] = []


class ClipHookHandle:
    """Calls `hook` at every clipping of the process until it is removed; the last one leaves torch as it was.

    Args:
        hook: A method, whose object is not kept alive by this.
    """

    def __init__(self, hook: ClipHook) -> None:
        self._hook = weakref.WeakMethod(hook)
        if not _hooks:
            for module, name in _NAMES:
                clip = getattr(module, name, None)
                if clip is not None:
                    setattr(module, name, _watched(clip))
        _hooks.append(self._hook)

    def remove(self) -> None:
        """Call the hook no more."""
        if self._hook in _hooks:
            _hooks.remove(self._hook)
        for module, name in _NAMES if not _hooks else ():
            clip = getattr(getattr(module, name, None), _WRAPS, None)
            if clip is not None:  # else someone has wrapped it since, and it stays within
                setattr(module, name, clip)


def _watched(clip: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(clip)
    def clip_watched(
        parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        # A generator can be read only once.
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        hooks = [hook for reference in tuple(_hooks) if (hook := reference()) is not None]
        after = [hook(parameters, max_norm, total_norm) for hook in hooks]
        del hooks
        clip(parameters, max_norm, total_norm, *args, **kwargs)
        for each in after:
            if each is not None:
                each()

    setattr(clip_watched, _WRAPS, clip)
    return clip_watched


class Clip(NamedTuple):
    """One clipping: whose gradients, their norm before it, and the limit; numbers may still be on the device.

    Where `is_measured`, `norm` is that of one gradient alone, and `limit` what became of it. Clipping to a norm that is
    not finite spreads NaN over all gradients: `not_finite` are those that had it before, None where that is not known.
    """

    parameters: frozenset[int]
    norm: Number
    limit: Number
    is_measured: bool = False
    not_finite: frozenset[int] | None = None

    @property
    def ready(self) -> bool:
        """Whether `factor` would return at once."""
        return is_ready(self.norm) and is_ready(self.limit)

    @property
    def factor(self) -> float:
        """What the gradients were scaled by; NaN where that can't be told, as of gradients that are all zero."""
        norm, limit = number(self.norm), number(self.limit)
        if self.is_measured:
            return limit / norm if norm > 0 and limit > 0 else math.nan
        factor = min(1.0, limit / (norm + _EPSILON))
        return factor if factor > 0 else math.nan


class Clips:
    """The clippings of a run's parameters since they were last taken.

    Args:
        parameters: Those of the run.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = frozenset(map(id, parameters))
        self._clips: deque[Clip] = deque(maxlen=_MAX_CLIPS)

    def begin(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> AfterClip | None:
        """As `ClipHook`."""
        clipped = self._own.intersection(map(id, parameters))
        if not clipped:
            return None
        if type(total_norm) is Tensor:
            norm = copied(total_norm)
            bad = None
            if not isinstance(norm, AsyncHostCopy) and not math.isfinite(norm):
                bad = frozenset(id(each) for each in parameters if not _is_finite(each))
            self._clips.append(Clip(clipped, norm, copied(max_norm), not_finite=bad))
            return None
        # A sharded norm is not known before all ranks have added it up, so one gradient tells what becomes of it.
        held = [gradient for gradient in map(_held_gradient, parameters) if gradient is not None and gradient.numel()]
        if not held:
            return None
        witness = min(held, key=Tensor.numel)
        before = _norm(witness)
        return lambda: self._clips.append(Clip(clipped, before, _norm(witness), is_measured=True))

    def take(self) -> list[Clip]:
        """Return and forget them, oldest first."""
        taken = list(self._clips)
        self._clips.clear()
        return taken


def _held_gradient(parameter: Tensor) -> Tensor | None:
    # However it is placed: scaling is the same for each rank's part, and redistributing it would be a collective.
    return None if parameter.grad is None else local_tensor(parameter.grad)


def _is_finite(parameter: Tensor) -> bool:
    gradient = _held_gradient(parameter)
    return gradient is None or bool(gradient.isfinite().all())


def _norm(gradient: Tensor) -> Number:
    return copied(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))
