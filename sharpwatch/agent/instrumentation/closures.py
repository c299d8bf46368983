"""`step(closure)`: an ear between an optimizer and the closure that it evaluates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Closure = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of `step()` as torch's hooks have them: the optimizer is the first


def through(evaluate: Closure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The arguments of a `step()` whose closure is evaluated by `evaluate(closure)`; None where it was given none."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _evaluated(evaluate, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _evaluated(evaluate, args[1]), *args[2:]), kwargs
    return None


def _evaluated(evaluate: Closure, closure: Closure) -> Closure:
    @functools.wraps(closure)
    def call(*args: Any, **kwargs: Any) -> Any:
        return evaluate(closure, *args, **kwargs)

    return call
