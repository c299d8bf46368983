"""Finds what in a graph can be differentiated only once, where autograd would go on without a word.

torch raises for its own operators that have no second derivative. A Python `autograd.Function` whose backward is marked
once-differentiable, or is a kernel of its own, is instead cut out of the gradient's graph: the Hessian comes out wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sharpwatch.errors import ProbeError

# Packages whose backwards are kernels that autograd can't see into.
_KERNELS = ("flash_attn", "liger_kernel", "xformers", "apex", "transformer_engine")
_COMPLAINTS = ("not implemented", "differentiate twice", "double backward", "no autograd formula")


def require_twice_differentiable(loss: Tensor) -> None:
    """Raise `ProbeError` with the name of a function in `loss`'s graph that has no second derivative."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and _only_once(function):
            name = f"{function.__module__}.{function.__qualname__}"
            raise ProbeError(f"the model can't be differentiated twice: {name} has no second derivative")
        waiting.extend(following for following, _ in node.next_functions)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Turns torch's complaint about a missing second derivative into a `ProbeError`."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _COMPLAINTS):
            raise
        raise ProbeError(f"the model can't be differentiated twice: {error}") from error


def _only_once(function: type[Any]) -> bool:
    code = getattr(function.backward, "__code__", None)
    marked = code is not None and code.co_filename == torch.autograd.function.once_differentiable.__code__.co_filename
    return (marked and hasattr(function.backward, "__wrapped__")) or any(
        package in function.__module__ for package in _KERNELS
    )
