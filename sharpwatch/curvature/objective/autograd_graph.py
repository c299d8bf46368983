"""What a loss's graph tells: what in it can be differentiated only once, and where the loss is not smooth.

torch raises for its own operators that have no second derivative. A Python `autograd.Function` whose backward is marked
once-differentiable, or is a kernel of its own, is instead cut out of the gradient's graph: the Hessian comes out wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpwatch.errors import ProbeError

# Packages whose backwards are kernels that autograd can't see into.
_KERNEL_PACKAGES = ("flash_attn", "liger_kernel", "xformers", "apex", "transformer_engine")
# The beginnings of their backwards' names.
_NONSMOOTH_BACKWARDS: tuple[str, ...] = (
    "Relu",
    "LeakyRelu",
    "Prelu",
    "Rrelu",
    "Elu",
    "Threshold",
    "Hard",
    "Softshrink",
    "Clamp",
)
_NONSMOOTH_BACKWARDS += ("Abs", "Huber", "SmoothL1", "Round", "Floor", "Ceil", "Trunc", "Sign", "Remainder", "Fmod")
_NONSMOOTH_BACKWARDS += (
    "Topk",
    "Sort",
    "Kthvalue",
    "Gather",
    "Max",
    "Min",
    "Amax",
    "Amin",
    "AdaptiveMax",
    "Cummax",
    "Cummin",
)
_NONSMOOTH_BACKWARDS += ("Median", "Mode")
_NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "no autograd formula")


def require_twice_differentiable(loss: Tensor) -> None:
    """Raise `ProbeError` with the name of a function in `loss`'s graph that has no second derivative."""
    for node in _nodes(loss):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and _is_once_differentiable(function):
            name = f"{function.__module__}.{function.__qualname__}"
            raise ProbeError(f"the model can't be differentiated twice: {name} has no second derivative")


def custom_functions(loss: Tensor) -> list[str]:
    """The names of Python `autograd.Function`s in `loss`'s graph."""
    found = (getattr(type(node), "_forward_cls", None) for node in _nodes(loss))
    return sorted({f"{function.__module__}.{function.__qualname__}" for function in found if function is not None})


def is_smooth(loss: Tensor) -> bool:
    """Whether nothing in `loss`'s graph chooses or has a kink: experts by top-k, ReLU and its kin.

    Differences go across kinks and jumps, and see a curvature there that derivatives, taken between them, don't.
    """
    return not any(type(node).__name__.startswith(_NONSMOOTH_BACKWARDS) for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Around a loss and its derivatives: attention by the kernel that has two of them, also where it is recomputed.

    Turns torch's complaint about a missing second derivative into a `ProbeError`.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        raise ProbeError(f"the model can't be differentiated twice: {error}") from error


def _is_once_differentiable(function: type[Any]) -> bool:
    code = getattr(function.backward, "__code__", None)
    marked = code is not None and code.co_filename == torch.autograd.function.once_differentiable.__code__.co_filename
    return (marked and hasattr(function.backward, "__wrapped__")) or any(
        package in function.__module__ for package in _KERNEL_PACKAGES
    )
